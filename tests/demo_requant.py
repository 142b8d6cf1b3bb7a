"""Makes the other quant types of the demo model, with the reference quantizer of the `gguf` package."""

from pathlib import Path

import gguf
import numpy as np


def requantize(source: Path, out: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Writes the model `source` to `out`: every 2-D weight dequantized and quantized again to `kind`, the 1-D
    norms as F32, the metadata as they are, save the file type. `kind` is a type that `gguf.quants.quantize`
    can make: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], of)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}" if kind.name != "F32" else "ALL_F32"])
    for t in reader.tensors:
        x = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        if x.ndim == 1:
            writer.add_tensor(t.name, x)
        else:
            writer.add_tensor(t.name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
