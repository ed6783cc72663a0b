"""Find the images in a folder by the files' content, not by their names."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

# Formats that are decoded: torchvision's image formats, GIF and AVIF. Formats that run other
# programs or contain scripts are left out.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF")
# First bytes of AppleDouble files (`._name`), which macOS writes on other file systems.
APPLE_DOUBLE = b"\x00\x05\x16\x07"
# Camera raw files look like TIFF, and their first image is a small preview.
RAW = (
    ".3fr", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".nef",
    ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw",
)  # fmt: skip
# Suffixes of image files, including formats that cannot be decoded. A file with such a suffix that
# is not a readable image is reported as damaged instead of being left out.
SUFFIXES = frozenset(
    {
        ".apng", ".avif", ".avifs", ".bmp", ".cr3", ".dib", ".gif", ".heic", ".heics", ".heif",
        ".hif", ".j2k", ".jfif", ".jif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".jxl", ".pbm",
        ".pgm", ".pjp", ".pjpeg", ".png", ".pnm", ".ppm", ".psd", ".tga", ".tif", ".tiff", ".webp",
        *RAW,
    }
)  # fmt: skip
# Names, in lower case, of files and folders created by operating systems, editors, synchronisation
# tools and storage devices. Names that begin with a dot are sidecars too.
SIDECARS = frozenset(
    {
        "__macosx", "__pycache__", "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recycle",
        "@recently-snapshot", "@synoeastream", "@synoresource", "@tmp", "desktop.ini",
        "ehthumbs.db", "ehthumbs_vista.db", "folder.htt", "icon\r", "lost+found",
        "network trash folder", "picasa.ini", "system volume information",
        "temporary items", "thumbs.db", "zbthumbnail.info",
    }
)  # fmt: skip


# Names of thumbnail folders inside a class folder.
THUMBNAILS = ("thumbnails", "_thumbnails", "thumbs", "_thumbs")
# Dot folders that are certainly not classes; skipping any other one is reported.
DOT_FOLDERS = (
    ".appledouble", ".dropbox.cache", ".fseventsd", ".git", ".ipynb_checkpoints", ".spotlight-v100",
    ".temporaryitems", ".thumbnails", ".trash", ".trashes", ".@__thumb",
)  # fmt: skip
READERS = 8
# First bytes of files that are often named as images, and a description of each format.
OTHERS = {
    b"ftyphei": "HEIC, which is not decoded here; convert it to JPEG or PNG",
    b"ftyphev": "HEIC, which is not decoded here; convert it to JPEG or PNG",
    b"ftypmif1": "HEIF, which is not supported; convert it to JPEG or PNG",
    b"ftypcrx": "a camera raw file; convert it to JPEG or PNG",
    b"\xff\x0a": "JPEG XL, which is not decoded here; convert it to JPEG or PNG",
    b"JXL \r\n": "JPEG XL, which is not decoded here; convert it to JPEG or PNG",
    b"jP  \r\n": "JPEG 2000, which is not supported; convert it to JPEG or PNG",
    b"8BPS": "a Photoshop file; convert it to JPEG or PNG",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive",
    b"ftypavif": "a damaged AVIF file",
    b"ftyp": "a video or a similar file",
    b"version https://git-lfs": "a Git LFS pointer; download the file with `git lfs pull`",
    b"<?xml": "XML or SVG",
    b"<svg": "SVG",
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<!--": "an HTML page or XML",
    b"{": "JSON text",
}


@dataclass
class Found:
    """The result of a walk."""

    images: list[Path] = field(default_factory=list)
    """image files by content, and damaged files with the suffix of an image, sorted by name"""
    left_out: Counter[str] = field(default_factory=Counter)
    """number of other files by suffix"""
    denied: list[Path] = field(default_factory=list)
    """folders without read permission"""

    @property
    def empty(self) -> bool:
        """Whether there are no files at all."""
        return not self.images and not self.left_out and not self.denied


def walk(folder: Path, outer: Sequence[Path] = ()) -> Found:
    """Find the images under a folder.

    Links are followed, and each folder is entered once. Sidecars (files left by operating systems
    and tools) are ignored and not counted.

    Args:
        folder: where to look.
        outer: folders that links must not lead back to, such as the parents of `folder`.
    """
    found = Found()
    entered = {identity for each in outer if (identity := identity_of(each)) is not None}
    paths = sorted(_files(folder, entered, found.denied))
    # Disks and networks serve several reads at once.
    with ThreadPoolExecutor(READERS) as pool:
        kinds = list(pool.map(kind_of, paths))
    for path, kind in zip(paths, kinds, strict=True):
        if kind in ("image", "damaged"):
            found.images.append(path)
        elif kind == "other":
            found.left_out[path.suffix.lower() or "without a suffix"] += 1
    return found


def streamed(folder: Path) -> Iterator[Path]:
    """Yield the files under a folder except sidecars, with one folder's names in memory at a time.

    Files are sorted by name, so the order is the same at every call; links are followed as in
    `walk`.
    """
    denied: list[Path] = []
    yield from _files(folder, set(), denied)
    if denied:
        raise PermissionError(
            f"no permission to read the folder {denied[0]}; change its permissions"
        )


def subfolders(folder: Path) -> list[Path]:
    """List the folders in a folder except sidecars, sorted by name."""
    return sorted(
        p
        for p in folder.iterdir()
        if not p.name.startswith(".") and p.name.lower() not in SIDECARS and p.is_dir()
    )


def not_entered(folder: Path) -> list[str]:
    """List dot folders and broken links, which may have been meant as class folders."""
    return sorted(
        p.name
        for p in folder.iterdir()
        if (p.name.startswith(".") and p.name.lower() not in DOT_FOLDERS and p.is_dir())
        or (p.is_symlink() and not p.exists() and not p.suffix)
    )


def identity_of(folder: Path) -> tuple[int, int] | None:
    """Return a folder's device and inode, the same for every path to it; None if unreadable."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_sidecar(name: str) -> bool:
    """Report whether a name is that of a file or folder left by a system, editor or device."""
    backup = name.endswith("~") or name.startswith(("~$", "."))
    return backup or name.lower() in SIDECARS


def kind_of(path: Path) -> str:
    """Classify a file: image, damaged (has the suffix of an image only), sidecar, or other."""
    named = path.suffix.lower() in SUFFIXES
    try:
        # Opening a pipe would block until something writes to it.
        if not stat.S_ISREG(path.stat().st_mode):
            return "other"
        with path.open("rb") as file:
            header = file.read(len(APPLE_DOUBLE))
    except PermissionError:
        # It may be an image.
        return "damaged"
    except OSError:
        return "damaged" if named else "other"
    if header == APPLE_DOUBLE:
        return "sidecar"
    if not is_raw(path.name) and opens(path):
        return "image"
    return "damaged" if named else "other"


def opens(path: Path) -> bool:
    """Report whether Pillow recognises a file's header as an image."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True
    # A damaged header can make Pillow's plugins raise anything.
    except Exception:
        return False


def is_raw(name: str) -> bool:
    """Report whether a file has the suffix of a camera's raw files."""
    return Path(name.strip("'\"")).suffix.lower() in RAW


def described(content: bytes, name: str) -> str:
    """Describe the content of a file that is not a decodable image."""
    if not content:
        return "it is empty"
    if not content.strip(b"\0"):
        return "it holds only zeros"
    if is_raw(name):
        return "it is a camera raw file; convert it to JPEG or PNG"
    # Text may begin with blanks, and some formats begin with a 4-byte length.
    start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    for mark, what in OTHERS.items():
        if content[:16].find(mark) in (0, 4) or start.lower().startswith(mark.lower()):
            return f"it is {what}"
    return f"it is damaged, or not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


def _files(folder: Path, entered: set[tuple[int, int]], denied: list[Path]) -> Iterator[Path]:
    identity = identity_of(folder)
    # A link may lead back up, and two links to one folder would list its images twice.
    if identity is None or identity in entered:
        return
    entered.add(identity)
    try:
        with os.scandir(folder) as entries:
            kept = sorted((e for e in entries if not is_sidecar(e.name)), key=lambda e: e.name)
    except PermissionError:
        denied.append(folder)
        return
    for entry in kept:
        if not _is_folder(entry):
            yield folder / entry.name
        elif entry.name.lower() not in THUMBNAILS:
            yield from _files(folder / entry.name, entered, denied)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    # A link to itself.
    except OSError:
        return False
