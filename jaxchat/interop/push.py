"""An export to the Hugging Face hub: a folder as a model, the HTML page as a static Space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxchat.errors import DataError, UsageError, first_line
from jaxchat.log import animated, say

SPACE = """---
title: {name}
emoji: 💬
sdk: static
tags:
- jaxchat
---

A chat model in one page. It runs in the browser and sends nothing.
"""
REPLACED = (".safetensors", ".safetensors.index.json", ".onnx", ".onnx.data")  # deleted there if not sent again
ADVICE = {
    401: "the token is not accepted: log in with hf auth login, or set HF_TOKEN",
    403: "take an owner and a token that may write there",
    None: "see whether this machine reaches it",
}


def check_push(repo: str, dry_run: bool) -> None:
    """Raise `UsageError` where `repo` is not OWNER/NAME or there is no token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("the owner is missing")
    except HFValidationError as error:
        raise UsageError(f"--push {repo}: not a name OWNER/NAME ({first_line(error)})") from None
    if not dry_run and not get_token():
        raise UsageError(f"--push {repo}: there is no token; log in with hf auth login, or set HF_TOKEN")


def push(export: Path, repo: str, *, public: bool, update: bool, license: str | None, dry_run: bool) -> None:
    """Send an export to the hub in one commit, or list what would be sent. The export is left as it is.

    `license`: for the head of the card, as the hub names it. `UsageError` where `repo` has files and not `update`;
    `DataError` says what the hub answered.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not animated():
        disable_progress_bars()
    api, page = HfApi(), export.is_file()
    kind, url = ("space", f"{api.endpoint}/spaces/{repo}") if page else ("model", f"{api.endpoint}/{repo}")
    paths = [export] if page else sorted(p for p in export.rglob("[!.]*") if p.is_file())
    names = ["index.html"] if page else [path.relative_to(export).as_posix() for path in paths]
    sent: dict[str, Any] = dict(zip(names, paths, strict=True))  # path there -> file here, or bytes
    try:
        card = SPACE.format(name=repo.split("/")[1]) if page else (export / "README.md").read_text(encoding="utf-8")
        if license:
            head = ModelCard(card)
            head.data["license"] = license
            card = str(head)
        sent["README.md"] = card.encode()
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in sent.items()]
        if dry_run:
            for file in operations:
                say(f"{file.upload_info.size:>14,}  {file.path_in_repo}")
            say(f"would go to {url} as a {'public' if public else 'private'} {kind}; nothing was sent")
            return
        try:
            info: Any = api.repo_info(repo, repo_type=kind)
            old = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
        except RepositoryNotFoundError:  # or the token may not see it: then it cannot be created
            old = set()
            api.create_repo(repo, repo_type=kind, private=not public, space_sdk="static" if page else None)
        if old and not update:
            raise UsageError(f"{url} exists already; give --update to send a new version, or take another name")
        operations += [CommitOperationDelete(name) for name in old - sent.keys() if name.endswith(REPLACED)]
        say(f"pushed: {api.create_commit(repo, operations, commit_message='jaxchat', repo_type=kind).commit_url}")
    except Exception as error:  # also those of the client's HTTP library, which changes between versions
        if isinstance(error, UsageError):
            raise
        cause = error if hasattr(error, "response") else error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 409:
            raise UsageError(f"{url} exists already, and your token may not write there; take another name") from None
        why = getattr(cause, "server_message", None) or " ".join(str(cause).split())[:300].rstrip(".")
        advice = ADVICE.get(status, "give the same command again")
        raise DataError(f"{url}: could not be pushed ({why}); {advice}. {export} stays as it is") from None
