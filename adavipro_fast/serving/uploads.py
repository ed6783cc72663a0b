"""What a client sends to `/classify`: image files and options, as a body, a form or JSON."""

import base64
import binascii
import json
import re
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
# More text fields than there are options, so that an unknown one is named.
MOST_FIELDS = 32
DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w=-]+)*;base64,")


@dataclass(frozen=True)
class Upload:
    """A request's image files with their names, and its options as text."""

    files: list[tuple[str, bytes]]
    options: Mapping[str, str] = field(default_factory=dict)


async def uploaded(body: bytes, headers: Headers, most_files: int) -> Upload:
    """Read the image files and options of a request.

    Args:
        body: all of it.
        headers: of the request.
        most_files: that a form may have.

    Raises:
        ValueError: it cannot be read, with the way to send it.
    """
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(body, headers, most_files)
    if kind == "application/json" or kind.endswith("+json"):
        return _json(body)
    return Upload([("image", body)] if body else [])


def clean(text: str) -> str:
    """Make text that holds a client's words one that any answer can hold."""
    return text.encode(errors="replace").decode()


async def _form(body: bytes, headers: Headers, most_files: int) -> Upload:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        headers, stream(), max_files=most_files, max_fields=MOST_FIELDS, max_part_size=len(body)
    )
    files, options = [], {}
    try:
        form = await parser.parse()
        for name, value in form.multi_items():
            if isinstance(value, str):
                options[name] = value
            else:
                files.append((clean(value.filename or "image"), await value.read()))
    except (MultiPartException, KeyError, ValueError) as error:
        raise ValueError(f"the form cannot be read: {error}") from None
    return Upload(files, _known(options))


def _json(body: bytes) -> Upload:
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}; {HOW}") from None
    if not isinstance(content, dict) or not {"image", "images"} & content.keys():
        raise ValueError(f"the JSON has no images; {HOW}")
    options = {k: str(v) for k, v in content.items() if k not in ("image", "images")}
    images = content.get("images", content.get("image"))
    images = images if isinstance(images, list) else [images]
    return Upload([(str(n), _decoded(each)) for n, each in enumerate(images)], _known(options))


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"an image is {type(text).__name__}, not base64 text; {HOW}")
    start = DATA_URL.match(text)
    try:
        # Clients break lines, or use the alphabet for addresses.
        plain = "".join(text[start.end() if start else 0 :].split())
        plain = plain.replace("-", "+").replace("_", "/").rstrip("=")
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"an image is not base64: {error}; {HOW}") from None


def _known(options: dict[str, str]) -> dict[str, str]:
    unknown = next((name for name in options if name not in OPTIONS), None)
    if unknown is not None:
        raise ValueError(
            f"field {clean(unknown)!r} is unknown; known ones are {', '.join(OPTIONS)}, and images "
            "are sent as files"
        )
    return options
