"""``docs/families.md`` against the families themselves.

Every run compares the dense families and an eighth of the others, in turns by the day; all are
compared where the table is written: ``python tests/support/family_table.py``.
"""

import datetime

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from family_checks import examined
from family_configs import families
from family_table import DENSE, read_table, row_of

TABLE = read_table()
OTHERS = [name for name in families() if name not in DENSE]
TODAY = OTHERS[datetime.date.today().toordinal() % 8 :: 8]


def test_the_table_has_every_causal_family_of_transformers():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(families()) == set(TABLE)
    assert not [row for row in TABLE.values() if "| wrong |" in row]


@pytest.mark.parametrize("name", DENSE)
def test_dense_families_are_right_with_every_linear_adapted(name):
    found = examined(name)
    assert found["verdict"] == "right" and not found["said"], found
    assert row_of(name, found) == TABLE[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TODAY)
def test_the_other_families_are_as_the_table_says(name):
    assert row_of(name, examined(name)) == TABLE[name]
