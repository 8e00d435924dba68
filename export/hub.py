"""Uploads an export to the Hugging Face Hub, or to a mirror that HF_ENDPOINT names."""

from pathlib import Path


def check_push(name: str) -> None:
    """ValueError for whatever would make an upload to `name` fail and can be known before the work."""
    try:
        from huggingface_hub import get_token
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise ValueError("--push_to_hub needs a package: pip install huggingface_hub") from None
    validate_repo_id(name)
    if get_token() is None:
        raise ValueError("--push_to_hub needs a token: `hf auth login`, or HF_TOKEN in the environment")


def push(files: list[Path], name: str) -> str:
    """Uploads the files to the repository `name`, made if it is not there -> its address; OSError if that fails."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    address = api.create_repo(name, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=str(path)) for path in files]
    api.create_commit(address.repo_id, operations, commit_message="Upload model")
    return str(address)
