"""Read requests to `/classify`: image files and options, as a body, a form or JSON."""

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

OPTIONS = ("model", "task", "top", "reject")
HOW = (
    "send image files as a form (curl -F image=@photo.jpg), one as the body (curl --data-binary "
    '@photo.jpg), or JSON as {"images": ["<base64>", ...]}'
)
# More than the number of options, so that an unknown field is reported by name.
MOST_FIELDS = 32


@dataclass(frozen=True)
class Upload:
    """A request's image files with their names, and its options as text."""

    files: list[tuple[str, bytes | ValueError]]
    """a name and the content, or an error if the request does not contain it correctly"""
    options: Mapping[str, str] = field(default_factory=dict)


async def uploaded(body: bytes, headers: Headers, most_files: int) -> Upload:
    """Read the image files and options of a request.

    Args:
        body: the complete body.
        headers: of the request.
        most_files: largest number of files in a form.

    Raises:
        ValueError: the request cannot be read; the message tells how to send images.
    """
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(body, headers, most_files)
    if kind == "application/json" or kind.endswith("+json"):
        return _json(body)
    return Upload([("image", body)] if body else [])


def clean(text: str) -> str:
    """Replace characters of a client's text that cannot be encoded as UTF-8."""
    return text.encode(errors="replace").decode()


async def _form(body: bytes, headers: Headers, most_files: int) -> Upload:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        headers, stream(), max_files=most_files, max_fields=MOST_FIELDS, max_part_size=len(body)
    )
    files: list[tuple[str, bytes | ValueError]] = []
    options = {}
    try:
        form = await parser.parse()
        for name, value in form.multi_items():
            if isinstance(value, str):
                options[name] = value
            else:
                files.append((clean(value.filename or "image"), await value.read()))
    except (MultiPartException, KeyError, ValueError) as error:
        raise ValueError(f"the form cannot be read: {error}") from None
    if not files:
        raise ValueError(f"the form contains no file or is truncated; {HOW}")
    return Upload(files, _known(options))


def _json(body: bytes) -> Upload:
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}; {HOW}") from None
    if not isinstance(content, dict) or not {"image", "images"} & content.keys():
        raise ValueError(f"the JSON has no field images; {HOW}")
    options = {
        k: v if isinstance(v, str) else json.dumps(v)
        for k, v in content.items()
        if k not in ("image", "images") and v is not None
    }
    images = content.get("images", content.get("image"))
    images = images if isinstance(images, list) else [images]
    return Upload([(str(n), _decoded(each)) for n, each in enumerate(images)], _known(options))


def _decoded(text: Any) -> bytes | ValueError:
    if not isinstance(text, str):
        return ValueError(f"an image is {json.dumps(text)[:20]}, not base64 text; {HOW}")
    # A data URL begins with its media type.
    _, _, body = text.partition(";base64,") if text.startswith("data:") else ("", "", text)
    try:
        # Accept line breaks and the URL-safe alphabet.
        plain = "".join(body.split())
        plain = plain.replace("-", "+").replace("_", "/").rstrip("=")
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        return ValueError(f"an image is not base64: {error}; {HOW}")


def _known(options: dict[str, str]) -> dict[str, str]:
    unknown = next((name for name in options if name not in OPTIONS), None)
    if unknown is not None:
        raise ValueError(
            f"unknown field {clean(unknown)!r}; use {', '.join(OPTIONS)}, and send images as files"
        )
    return options
