"""Zarr's metadata of a cache. The only file that imports zarr: the chunks are plain files, or compressed by numcodecs
as Zarr's own codecs would do it."""

import warnings
from typing import Any

from pipeline.data.codecs import PCODEC_LEVEL
from pipeline.data.layout import STORED, Json, Spec
from pipeline.data.options import Codec


def zarr_metadata(specs: dict[str, Spec], attributes: Json) -> dict[str, bytes]:
    """Every `zarr.json` of the hierarchy, by its path, as Zarr itself writes it."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(files), attributes=attributes)
    for name, spec in specs.items():
        serializer, compressors = _codecs(spec)
        root.create_array(
            name,
            shape=spec.shape,
            chunks=spec.chunk_shape,
            dtype=spec.dtype,
            serializer=serializer,
            filters=None,
            compressors=[*compressors, Crc32cCodec()],
            fill_value=0,
            dimension_names=spec.dims,
            attributes=_attributes(name, spec),
        )
    return {name: data.to_bytes() for name, data in files.items()}


def _codecs(spec: Spec) -> tuple[Any, list[Any]]:
    """Serializer and compressors."""
    from zarr.codecs import BloscCodec, BytesCodec
    from zarr.codecs.numcodecs import PCodec

    plain = BytesCodec(endian="little")
    if spec.compressor is None:
        return plain, []
    if spec.compressor == Codec["pcodec"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is no part of Zarr's specification: it is part of Zarr's package
            return PCodec(level=PCODEC_LEVEL), []
    return plain, [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2)]


def _attributes(name: str, spec: Spec) -> Json:
    if not name.endswith(STORED) or spec.dtype not in ("uint16", "int8"):
        return {}
    if spec.dtype == "uint16":
        return {"logical_dtype": "bfloat16"}
    return {"logical_dtype": "bfloat16", "value": f"offset + scale * q, by codec/{name}/offset and codec/{name}/scale"}
