"""Files on the Hugging Face Hub: `hub:owner/name` stands where a checkpoint's path may.

huggingface_hub fetches, caches and sends. Tokens are its own, from HF_TOKEN or `hf auth login`.
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
# Engines are programs for one machine, and their sidecar lies beside them.
OPENED = (".safetensors", ".onnx")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
OFFLINE = "HF_HUB_OFFLINE is set; unset it"
NETWORK = "the Hub cannot be reached; check network, proxy and HF_ENDPOINT"
# What huggingface_hub raises, the more special before the general; what we raise; what we say.
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
    """Return where a file lies on this disk; what `hub:owner/name` names is fetched first.

    Args:
        path: a file, `hub:owner/name`, or that with `@revision` (a branch, tag or commit), with
            `/FILE`, or with both.

    Raises:
        ValueError: the address is none, or names a file that is not opened from there.
        OSError: it cannot be fetched, with the reason.
    """
    if not path.as_posix().startswith(SCHEME):
        return path
    address = ADDRESS.fullmatch(path.as_posix())
    if address is None:
        raise ValueError(f"{path} is not a Hub address; use {FORM}")
    repository, revision, file = address.groups()
    return fetch(repository, file or CHECKPOINT, revision=revision)


def fetch(repository: str, file: str = CHECKPOINT, **options: Any) -> Path:
    """Fetch a file into huggingface_hub's cache, where it is not there yet.

    Args:
        repository: owner/name.
        file: of the repository.
        options: of `huggingface_hub.hf_hub_download`: revision, cache_dir, local_files_only, ...

    Raises:
        ValueError: not a file that is opened from the Hub.
        OSError: it cannot be fetched, with the reason.
    """
    if not file.endswith(OPENED):
        raise ValueError(
            f"cannot open {file} of {repository}: only {' and '.join(OPENED)} files are supported"
        )
    with hub_errors(repository, file):
        path = Path(hf_hub_download(repository, file, library_name=LIBRARY, **options))
    # Weights of a large graph lie in a second file.
    if path.suffix == ".onnx" and b"data_sha256" in path.read_bytes():
        with hub_errors(repository, f"{file}.data"):
            hf_hub_download(repository, f"{file}.data", library_name=LIBRARY, **options)
    return path


def check_repository(repository: str) -> None:
    """Raise ValueError where a name is not of the form owner/name."""
    if re.fullmatch(REPOSITORY, repository) is None:
        raise ValueError(f"{repository!r} is not a repository name; use OWNER/NAME")


def send(folder: Path, repository: str, *, private: bool = False) -> CommitInfo:
    """Commit the files of a folder, and make the repository where there is none.

    Raises:
        OSError: it cannot be sent, with the reason; or it is to be private and is public.
    """
    with hub_errors(repository):
        api = HfApi(library_name=LIBRARY)
        # Not False: an organisation's own default may be private.
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
    """Name the run that a file is of: its folder, or the repository that it was fetched from."""
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
    # huggingface_hub's, its HTTP client's and its upload's errors have no common base.
    except Exception as error:
        raise _explained(error, repository, file) from error


def _explained(error: Exception, repository: str, file: str) -> Exception:
    """Return the error to raise; texts of the HTTP client, which holds the token, are left out."""
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
    # A disk that is full, a name or a model card that it does not take, ...
    if isinstance(error, OSError | ValueError):
        return error
    return ConnectionError(f"{repository}: {NETWORK} ({type(error).__name__})")
