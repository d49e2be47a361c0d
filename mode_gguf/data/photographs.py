"""Image samples from scikit-image's and scikit-learn's wheels: photographs, scans and micrographs.

Some are left out on purpose: validation asks about them when no held-out set is given.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from mode_gguf.data.sample import Message, Sample
from mode_gguf.errors import MissingResourceError

_LONGEST_SIDE = 640

_CAPTIONS = {
    "brick.png": "Long bricks laid in staggered rows with pale joints, seen at a slant, in black and white.",
    "camera.png": "A black and white photograph of a man in a dark coat who looks through a film camera on a tripod; "
    "behind him lie a lawn and, far away, tall buildings.",
    "cell.png": "A microscope image of one bright, round cell with a dark rim on a grey background.",
    "clock_motion.png": "A grey picture in which nothing is sharp: a bright disc, smeared by motion.",
    "coins.png": "Twenty-four old coins lie in four rows on a dark surface, each worn and showing another relief.",
    "grass.png": "Blades of grass and small leaves fill the whole picture, densely and without any order.",
    "gravel.png": "Small angular stones cover the ground from edge to edge, in black and white.",
    "hubble_deep_field.jpg": "Hundreds of distant galaxies of different shapes and colours on a black sky, seen by a "
    "space telescope.",
    "ihc.png": "A stained slice of tissue under the microscope: brown gland cells, and blue nuclei between them.",
    "logo.png": "A round logo in green and orange, in which the head of a scaly snake curls through the middle.",
    "microaneurysms.png": "A small grey detail of a retina with thin dark vessels and a few dark spots.",
    "motorcycle_left.png": "A red motorcycle stands in a garage in front of shelves full of boxes.",
    "phantom.png": "A drawing of grey and black ellipses inside a white ring, used to test tomography software.",
    "retina.jpg": "The back of an eye: a bright disc at the left, from which red vessels branch over an orange ground.",
    "text.png": "Handwritten signs on ruled paper, photographed at a slant in black and white.",
    "china.jpg": "A Chinese tower of several storeys with curved roofs stands above trees; a wide lake lies behind it.",
    "flower.jpg": "An orange dahlia with many small petals in front of dark green leaves.",
}

_QUESTIONS = (
    "Describe this picture.",
    "What do you see here?",
    "Write a caption for the image.",
    "Give a short description of the scene.",
    "What is shown in this image, and how does it look?",
    "Tell someone who cannot see it what is in the picture.",
)
_DETAIL_QUESTIONS = (
    "This is a part of a larger picture. What could the whole show?",
    "Which colours dominate here, and where?",
    "Is there any text in this image? If so, read it out.",
    "Beschreibe diesen Ausschnitt in zwei Sätzen.",
    "How many separate objects can be counted?",
    "Describe the texture and the light.",
    "Que voit-on sur cette image ?",
    "Is this a photograph, a drawing or a scan? Explain how you can tell.",
)


def photograph_samples(dataset: str) -> Iterator[Sample]:
    """Samples of every image, whole with a caption, and of a detail of it with a question and no answer.

    Raises:
        MissingResourceError: an installed package lacks one of its images.
    """
    for number, (name, caption) in enumerate(_CAPTIONS.items()):
        whole = _open(name)
        question = _QUESTIONS[number % len(_QUESTIONS)]
        messages = (Message("user", question), Message("assistant", caption))
        yield Sample(f"{dataset}: {name}", dataset, messages=messages, image=_fitted(whole))
        question = _DETAIL_QUESTIONS[number % len(_DETAIL_QUESTIONS)]
        detail = _fitted(_detail(whole, number))
        yield Sample(f"{dataset}: detail of {name}", dataset, messages=(Message("user", question),), image=detail)


@cache
def _folders() -> tuple[Path, ...]:
    import skimage  # a second each to import: only when the set is made
    import sklearn

    return Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"


def _open(name: str) -> Image.Image:
    path = next((folder / name for folder in _folders() if (folder / name).is_file()), None)
    if path is None:
        raise MissingResourceError(
            f"{name}: neither scikit-image nor scikit-learn as installed carries this picture; reinstall them, or name "
            "your own calibration data"
        )
    with Image.open(path) as image:
        return image.convert("RGB")


def _fitted(image: Image.Image) -> Image.Image:
    fitted = image.copy()
    fitted.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return fitted


def _detail(image: Image.Image, number: int) -> Image.Image:
    """A quadrant of the image, chosen by its number."""
    width, height = image.width // 2, image.height // 2
    left, top = width * (number % 2), height * (number // 2 % 2)
    return image.crop((left, top, left + width, top + height))
