"""How the codes of a layer are decoded: one class and one module for each kind.

base          Code, the base class: decode, pack, count
affine        level(k) = k
shared_table  tables of levels that all layers of a model share
row_table     a table of levels for each row
trellis       the level depends on the codes above it too; of files from before bitshift codes
bitshift      a level for each of the last bits of a column
entropy       a compressed stream of symbols, and a step per row
column_entropy  the same with a rate per row and column
rate_tables   frequencies and levels of the symbols, shared by all layers of a model
overlay       a few weights in fp16, beside codes of any kind
"""

from collections.abc import Mapping
from typing import Any

from bayesq.quant.codes.affine import Affine
from bayesq.quant.codes.base import Code, Codebook, LevelPart, is_count, shown
from bayesq.quant.codes.bitshift import Bitshift, Congruential
from bayesq.quant.codes.column_entropy import ColumnEntropyCode
from bayesq.quant.codes.entropy import EntropyCode
from bayesq.quant.codes.overlay import SparseOverlay
from bayesq.quant.codes.rate_tables import RateTables
from bayesq.quant.codes.row_table import RowTable
from bayesq.quant.codes.shared_table import SharedTable
from bayesq.quant.codes.trellis import Trellis

__all__ = [
    "Affine",
    "Bitshift",
    "Code",
    "Codebook",
    "ColumnEntropyCode",
    "Congruential",
    "EntropyCode",
    "LevelPart",
    "RateTables",
    "RowTable",
    "SharedTable",
    "SparseOverlay",
    "Trellis",
    "code_class",
    "is_count",
    "shared_code",
    "shown",
]

# Values of `code` in a header. Affine codes, shared tables and trellises have no such entry: `trellis` and `codebooks`
# identify them.
CODES: Mapping[str, type[Code]] = {
    "row_table": RowTable,
    "bitshift": Bitshift,
    "congruential": Congruential,
    "entropy": EntropyCode,
    "column_entropy": ColumnEntropyCode,
}


def code_class(facts: Mapping[str, Any]) -> type[Code]:
    """The kind of code that a layer's entry in a header describes.

    Raises:
        ValueError: no code has that name.
    """
    if "code" in facts:
        if not isinstance(facts["code"], str) or facts["code"] not in CODES:
            raise ValueError(f"code: needs one of {', '.join(CODES)}, not {shown(facts['code'])}")
        return CODES[facts["code"]]
    if facts.get("trellis") is not None:
        return Trellis
    return Affine if facts.get("codebooks") == {} else SharedTable


def shared_code(tables: Mapping[int, Codebook]) -> Code:
    """The scalar code of rows with these tables by width."""
    return SharedTable(tables) if tables else Affine()
