"""The page that the TPU report writes."""

from benchmarks import tpu_report
from tools.report_page import replace_section


def test_the_page_has_every_section():
    page = tpu_report.PAGE.read_text()
    for name in tpu_report.SECTIONS:
        assert replace_section(page, name, ["new"]) != page
