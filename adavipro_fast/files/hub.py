"""Files on the Hugging Face Hub: use `hub:owner/name` in place of a checkpoint's path.

huggingface_hub downloads, caches and uploads. It gets its token from HF_TOKEN or `hf auth login`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, hf_hub_download
from huggingface_hub.hf_api import CommitInfo

CHECKPOINT = "checkpoint.safetensors"
LIBRARY = "adavipro_fast"
SCHEME = "hub:"
FORM = "hub:owner/name, hub:owner/name@revision or hub:owner/name/FILE"
REPOSITORY = r"[\w.-]+/[\w.-]+"
ADDRESS = re.compile(rf"{SCHEME}({REPOSITORY})(?:@([^/]+))?(?:/(.+))?")
# No engines: they are programs for one machine, and need their sidecar.
OPENED = (".safetensors", ".onnx")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
OFFLINE = "HF_HUB_OFFLINE is set; unset it"
NETWORK = "the Hub cannot be reached; check network, proxy and HF_ENDPOINT"
# huggingface_hub's exception (subclasses first), the exception to raise instead, and its message.
EXPLAINED: tuple[tuple[type[Exception], type[OSError], str], ...] = (
    (errors.OfflineModeIsEnabled, ConnectionError, OFFLINE + " to access {repository}"),
    (
        errors.GatedRepoError,
        PermissionError,
        f"{{repository}} is gated; ask for access on its page, then {LOG_IN}",
    ),
    (
        errors.RepositoryNotFoundError,
        FileNotFoundError,
        f"{{repository}} does not exist on the Hub, or you have no access to it; check the "
        "name, or "
        f"{LOG_IN}",
    ),
    (
        errors.RevisionNotFoundError,
        FileNotFoundError,
        "{repository} has no such revision; use a branch, a tag or a commit hash",
    ),
    (
        errors.RemoteEntryNotFoundError,
        FileNotFoundError,
        f"{{repository}} has no {{file}}; choose another file with {FORM}",
    ),
)


def on_disk(path: Path) -> Path:
    """Return a file's local path; download it first if it is on the Hub.

    Args:
        path: a file, or `hub:owner/name`, optionally with `@revision` (a branch, tag or commit)
            and `/FILE`.

    Raises:
        ValueError: the address is invalid, or files of this kind are not opened from the Hub.
        OSError: the file cannot be downloaded; the message has the reason.
    """
    if not path.as_posix().startswith(SCHEME):
        return path
    address = ADDRESS.fullmatch(path.as_posix())
    if address is None:
        raise ValueError(f"{path} is not a Hub address; use {FORM}")
    repository, revision, file = address.groups()
    return fetch(repository, file or CHECKPOINT, revision=revision)


def fetch(repository: str, file: str = CHECKPOINT, **options: Any) -> Path:
    """Download a file into huggingface_hub's cache unless it is already there.

    Args:
        repository: owner/name.
        file: path in the repository.
        options: of `huggingface_hub.hf_hub_download`: revision, cache_dir, local_files_only, ...

    Raises:
        ValueError: files of this kind are not opened from the Hub.
        OSError: the file cannot be downloaded; the message has the reason.
    """
    if not file.endswith(OPENED):
        raise ValueError(
            f"cannot open {file} of {repository}: only {' and '.join(OPENED)} files are supported"
        )
    with hub_errors(repository, file):
        path = Path(hf_hub_download(repository, file, library_name=LIBRARY, **options))
    # A large graph's weights are in a second file.
    if path.suffix == ".onnx" and b"data_sha256" in path.read_bytes():
        with hub_errors(repository, f"{file}.data"):
            hf_hub_download(repository, f"{file}.data", library_name=LIBRARY, **options)
    return path


def check_repository(repository: str) -> None:
    """Raise ValueError unless a name has the form owner/name."""
    if re.fullmatch(REPOSITORY, repository) is None:
        raise ValueError(f"{repository!r} is not a repository name; use OWNER/NAME")


def send(folder: Path, repository: str, *, private: bool = False) -> CommitInfo:
    """Upload the files of a folder in one commit; create the repository if it does not exist.

    Raises:
        OSError: the upload failed (the message has the reason), or the repository should be
            private and is public.
    """
    with hub_errors(repository):
        api = HfApi(library_name=LIBRARY)
        # None instead of False: an organisation's default may be private.
        api.create_repo(repository, private=private or None, exist_ok=True)
        public = private and not api.model_info(repository).private
    if public:
        raise PermissionError(
            f"{repository} exists and is public; make it private, or choose another name"
        )
    with hub_errors(repository):
        return api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Push with {LIBRARY}"
        )


def run_name(path: Path) -> str:
    """Return the name of a file's run: its folder's name, or the repository's."""
    folder = path.absolute().parent
    if folder.parent.name == "snapshots":
        # The cache's layout: models--owner--name/snapshots/<commit>/FILE.
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


@contextmanager
def hub_errors(repository: str, file: str = CHECKPOINT) -> Iterator[None]:
    """Re-raise errors of huggingface_hub as built-in exceptions with a one-line message."""
    try:
        yield
    # The errors of huggingface_hub, its HTTP client and its uploader have no common base class.
    except Exception as error:
        raise _explained(error, repository, file) from error


def _explained(error: Exception, repository: str, file: str) -> Exception:
    """Return the error to raise, without the HTTP client's text, which may contain the token."""
    for theirs, ours, text in EXPLAINED:
        if isinstance(error, theirs):
            return ours(text.format(repository=repository, file=file))
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = f"{OFFLINE} to download it" if constants.HF_HUB_OFFLINE else NETWORK
        return FileNotFoundError(f"{file} of {repository} is not in the cache, and {reason}")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return PermissionError(f"no permission to write to {repository} ({status}); {LOG_IN}")
        reason = error.server_message or "try again later"
        return ConnectionError(f"the Hub answered {status} for {repository}: {reason}")
    # A full disk, a name or model card that the Hub rejects, ...
    if isinstance(error, OSError | ValueError):
        return error
    return ConnectionError(f"{repository}: {NETWORK} ({type(error).__name__})")
