"""Sections of pages that programs write."""

import pytest

from tools.report_page import replace_section


def test_only_the_section_is_replaced():
    page = "Before\n\n<!-- begin a -->\nold\n<!-- end a -->\n\nafter\n"
    replaced = replace_section(page, "a", ["", "| new |", ""])
    assert replaced == page.replace("old", "| new |")
    assert replace_section(replaced, "a", ["", "| new |", ""]) == replaced
    with pytest.raises(ValueError, match="begin b"):
        replace_section(page, "b", [])
