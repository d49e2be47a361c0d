"""A GGUF file with less, or with other values, in it."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter

from tests.families.family_case import Converted


def gguf_copy(
    source: Path,
    target: Path,
    *,
    left_out: Collection[str] = (),
    rewritten: Mapping[str, Converted] | None = None,
    keys: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Path:
    """Copies `source` to `target` without some keys and tensors.

    Args:
        rewritten: what becomes of the values of F32 tensors, or of other tensors' bytes, by patterns of their names.
        keys: what becomes of the values of keys.
    """
    reader, changes, values = GGUFReader(source), dict(rewritten or {}), dict(keys or {})
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name not in {*left_out, "general.architecture"} and not name.startswith("GGUF."):
            inner = field.types[-1] if len(field.types) > 1 else None
            value = values[name](field.contents()) if name in values else field.contents()
            writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.name not in left_out:
            data = tensor.data
            for pattern, change in changes.items():
                data = change(data) if re.fullmatch(pattern, tensor.name) else data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
