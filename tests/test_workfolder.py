"""Names of files that others read."""

import re

from mode_gguf.workfolder import imatrix_file_name, model_file_name, projector_file_name


def test_file_names() -> None:
    name = model_file_name("Qwen3-VL-30B-A3B-Instruct", 3, "Q3_K")
    assert name == "Qwen3-VL-30B-A3B-Instruct-MODE-3.00bpw-Q3_K_MODE.gguf"
    tag = re.search(r"[-.]([A-Z0-9_]+)\.gguf$", name)
    assert tag is not None
    assert tag[1] == "Q3_K_MODE", "llama.cpp takes the tag after the last - or ."
    assert projector_file_name("M", "F16") == "mmproj-M-F16.gguf"
    assert imatrix_file_name("M") == "imatrix-M.gguf"
    assert imatrix_file_name("M", "fisher") == "imatrix-fisher-M.gguf"
