import re

import pytest
from conftest import ROOT

from benchmarks.readme import TABLES, filled

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_committed_results():
    assert filled(README) == README


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_its_place(name):
    assert README.count(f"<!-- {name} -->") == README.count(f"<!-- /{name} -->") == 1


def test_every_file_it_names_exists():
    for path in re.findall(r"`((?:configs|data|kernels|benchmarks|tests)/[\w./-]+|\w+\.py)`", README):
        assert any((ROOT / folder / path).exists() for folder in (".", "kernels", "data", "judging")), path


def test_the_map_names_every_source_file():
    for file in [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "judging").glob("*.py")]:
        assert file.name == "__init__.py" or file.name in README, file.name
