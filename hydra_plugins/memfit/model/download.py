"""Download of one ``config.json`` from a Hugging Face hub, and nothing else of the checkpoint."""

from __future__ import annotations

import contextlib
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit

from hydra_plugins.memfit.base.errors import ModelNotFound
from hydra_plugins.memfit.base.files import cache_dir, write_whole
from hydra_plugins.memfit.model.json_file import MAX_BYTES

TIMEOUT_S = 5.0


class _SameHostAuthorization(urllib.request.HTTPRedirectHandler):
    """Follows redirects without handing the token to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request, without the token where the host or the scheme changes."""
        following = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if following is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            following.remove_header("Authorization")
        return following


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether the user forbids downloads, in the words that huggingface_hub understands."""
    words = (environ.get("HF_HUB_OFFLINE", ""), environ.get("TRANSFORMERS_OFFLINE", ""))
    return any(word.upper() in ("1", "ON", "YES", "TRUE") for word in words)


def config_url(hub_id: str, environ: Mapping[str, str]) -> str:
    """Return the address of config.json at HF_ENDPOINT."""
    endpoint = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{quote(hub_id)}/resolve/main/config.json"


def cached_path(hub_id: str, environ: Mapping[str, str]) -> Path:
    """Return where a downloaded config.json is kept: XDG_CACHE_HOME/memfit/config/<host>/<org>--<name>.json."""
    host = urlsplit(config_url(hub_id, environ)).netloc.replace(":", "_")
    return cache_dir(environ) / "config" / host / f"{hub_id.replace('/', '--')}.json"


def download(hub_id: str, environ: Mapping[str, str]) -> bytes:
    """Return the bytes of config.json; raises `ModelNotFound` with the reason."""
    url = config_url(hub_id, environ)
    if urlsplit(url).scheme not in ("http", "https"):
        raise ModelNotFound(f"HF_ENDPOINT is not an http(s) address: {url}")
    headers = {"User-Agent": "memfit"} | _authorization(environ)
    try:
        return _get(urllib.request.Request(url, headers=headers), TIMEOUT_S)
    except urllib.error.HTTPError as error:
        raise ModelNotFound(f"{url} answered {error.code} ({_meaning(error.code)})") from error
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{url}: {getattr(error, 'reason', error)}") from error


def _authorization(environ: Mapping[str, str]) -> dict[str, str]:
    token = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN")
    return {"Authorization": f"Bearer {token.strip()}"} if token else {}


def _get(request: urllib.request.Request, timeout_s: float) -> bytes:
    deadline, data = time.monotonic() + timeout_s, b""
    with urllib.request.build_opener(_SameHostAuthorization).open(request, timeout=timeout_s) as answer:
        while chunk := answer.read1(1 << 16):
            data += chunk
            if len(data) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes, which is no config.json")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no complete answer within {timeout_s:g} s")
    return data


def _meaning(code: int) -> str:
    if code in (401, 403):
        return "gated or private: set HF_TOKEN"
    return "no such model" if code == 404 else "not available now"


def keep(path: Path, data: bytes) -> None:
    """Write ``data`` so that a reader sees all of it or nothing; a host without a writable cache goes on without."""
    with contextlib.suppress(OSError):
        write_whole(path, data)
