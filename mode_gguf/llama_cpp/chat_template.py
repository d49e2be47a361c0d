"""A model's own chat template, rendered from the Jinja source that its GGUF file stores."""

from dataclasses import dataclass
from typing import Any

from mode_gguf.chat_templates.rendering import TemplateError, render
from mode_gguf.errors import InputError


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """`source` is Jinja as tokenizers store it; `origin` is the file it came from, for messages."""

    source: str
    bos: str
    eos: str
    origin: str

    def question(self, text: str, image_marker: str | None = None) -> str:
        """The prompt at which the model answers `text`, with special tokens, up to where its answer begins.

        The image is `image_marker` ahead of the text, inside the user's turn: mtmd puts the family's own begin and end
        tokens around it, so the template must not. Thinking is switched off where a template knows the switch.

        Raises:
            InputError: the template is broken, takes too long or too much memory, or drops the question.
        """
        asked = f"{image_marker or ''}{text}"
        return self._render([("user", asked)], generate=True)

    def after_answer(self) -> str:
        """The template's text behind an answer, beginning with the end-of-turn token; raises as `question`."""
        mark = "\ue000"
        return self._render([("user", "?"), ("assistant", mark)], generate=False).rpartition(mark)[2].lstrip()

    def _render(self, turns: list[tuple[str, str]], *, generate: bool) -> str:
        failure: TemplateError | None = None
        for in_parts in (False, True):  # some templates want a string, some a list of parts
            messages: list[dict[str, Any]] = [
                {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
                for role, text in turns
            ]
            variables = {
                "messages": messages,
                "add_generation_prompt": generate,
                "enable_thinking": False,
                "tools": None,
                "bos_token": self.bos,
                "eos_token": self.eos,
            }
            try:
                rendered = render(self.source, variables)
            except TemplateError as error:
                failure = error
                if error.over_limit:
                    break
                continue
            if all(text.strip() in rendered for _, text in turns):
                return rendered
        reason = failure or "its output does not hold the messages"
        raise InputError(f"{self.origin}: the stored chat template cannot be used: {reason}")
