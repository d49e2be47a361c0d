"""Texts of strangers in Markdown, as a Markdown parser reads them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mode_gguf.hub.markdown import code, code_block, table, text, web_link
from mode_gguf.plain_text import one_line

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
ANY = st.text(st.characters(codec="utf-8"), max_size=60) | st.text("ab_*`|[]()<>&\\~$#!\n -+1.:/\"'", max_size=40)


def inline(markdown: str) -> list[Any]:
    """What stands in a paragraph that consists of `markdown`."""
    begin, content, end = PARSER.parse(f"x{markdown}x")
    assert (begin.type, end.type) == ("paragraph_open", "paragraph_close")
    return content.children or []


@given(ANY)
def test_text_is_text(value: str) -> None:
    parts = inline(text(value))
    assert {part.type for part in parts} <= {"text", "text_special"}
    assert "".join(part.content for part in parts) == f"x{one_line(value)}x"


@given(ANY)
def test_code_is_code(value: str) -> None:
    parts = [part for part in inline(code(value)) if part.content]
    assert [part.type for part in parts] == ["text", "code_inline", "text"]
    assert parts[1].content.strip() == one_line(value)


@given(ANY, ANY)
def test_cells_stay_cells(first: str, second: str) -> None:
    tokens = PARSER.parse(table(("a", "b"), [(text(first), code(second))]))
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    assert "".join(part.content for part in cells[2].children or []) == one_line(first)
    assert {part.type for part in cells[3].children or []} <= {"code_inline", "text"}
    assert "html" not in " ".join(part.type for cell in cells for part in cell.children or [])


@given(st.lists(ANY | st.just("```") | st.just("~~~"), min_size=1, max_size=3))
def test_blocks_stay_blocks(lines: list[str]) -> None:
    (block,) = PARSER.parse(code_block(*lines))
    assert block.type == "fence"
    assert block.content.count("\n") == len(lines)


@pytest.mark.parametrize(
    "address",
    ["https://x.org", "http://x.org:80/a?b=c#d", "https://huggingface.co/a/b/blob/main/LICENSE", "LICENSE", "a/b c.md"],
)
def test_links(address: str) -> None:
    assert web_link(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)",
        "JavaScript:alert(1)",
        " javascript:alert(1)",
        "java\nscript:alert(1)",
        "data:text/html,x",
        "file:///etc/passwd",
        "vbscript:x",
        "//evil.org/x",
        "/\\evil.org",
        "../x",
        "https://x.org/<script>",
        "https://x.org/a b",
        'https://x.org/"onclick=',
        "https://x.org/)[x](y",
        "https://me:secret@x.org",
        "x:y",
        "",
    ],
)
def test_no_links(address: str) -> None:
    assert web_link(address) is None
    assert web_link(address, "https://huggingface.co/a/b/blob/main") is None


def test_links_below() -> None:
    assert web_link("LICENSE 1.md", "https://x.org/main") == "https://x.org/main/LICENSE%201.md"
