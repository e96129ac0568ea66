"""Receipts that a person can be given: of their own request alone, signed by the operator's Ed25519 key.

As JSON, ``signature`` is of ``receipt`` in its canonical form; as HTML, of all bytes before the comment at its end.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_unlearn.errors import InputError
from recbole_unlearn.requests.queue import Queue
from recbole_unlearn.requests.secret import Secret, signed
from recbole_unlearn.storage.files import now, read_whole, write_atomically

FORMAT = "recbole_unlearn receipt 1"
TAIL = re.compile(rb"<!-- ed25519 ([0-9a-f]{64}) ([0-9a-f]{128}) -->\n")
ENDINGS = (".html", ".json")
MAX_BYTES = 1 << 20  # of a receipt


def receipt(queue: Queue, name: str, kind: str = "", tokens: Sequence[str] = ()) -> dict[str, Any]:
    """What became of a request.

    Args:
        queue: opened with the secret.
        name: the request's id.
        kind, tokens: as they were asked for, to be named in the receipt; they are not in the queue any more.

    Raises:
        InputError: it is not done, or others were asked for.
    """
    found = queue.request(name)
    if found["state"] != "done":
        why = f": {found['reason']}" if found["reason"] else ""
        raise InputError(f"request {name} is {found['state']}{why}; receipts are for what is done")
    if tokens and found["mark"] != queue.secret.mark(name, kind, tokens):
        raise InputError(f"request {name} was for others than {' '.join(tokens)}")
    facts = queue.facts(found["batch"]) if found["batch"] else {}
    told = ("model", "dataset", "method", "exact", "guard", "audit", "weights", "versions")
    asked = {key: found[key] for key in ("id", "kind", "received", "due", "done", "interactions")}
    return {
        "format": FORMAT,
        "issued": now(),
        "request": {
            **asked,
            **({"note": found["reason"]} if found["reason"] else {}),
            **({"tokens": list(tokens)} if tokens else {}),
        },
        **{key: facts[key] for key in told if key in facts},
    }


def as_json(content: dict[str, Any], secret: Secret) -> bytes:
    """A receipt as a signed JSON file."""
    return _file(content, secret.public_key, secret.sign(_canonical(content)))


def _file(content, public_key, signature):
    kept = {"receipt": content, "public_key": public_key, "signature": signature}
    return json.dumps(kept, indent=1).encode() + b"\n"


def as_html(content: dict[str, Any], secret: Secret) -> bytes:
    """A receipt as a signed page, which needs nothing else."""
    from markupsafe import Markup  # not wanted where there are no pages

    from recbole_unlearn.reports import templates
    from recbole_unlearn.reports.pictures import drawn

    style = drawn.STYLE + (templates.FOLDER / "style.css").read_text()
    page = templates.render(
        "receipt.html.jinja",
        receipt=content,
        public_key=secret.public_key,
        style=Markup(style),
        digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    ).encode()
    return page + f"<!-- ed25519 {secret.public_key} {secret.sign(page)} -->\n".encode()


def write(path: Path, content: dict[str, Any], secret: Secret) -> None:
    """Write a receipt as its file's ending says; InputError where it cannot be."""
    if path.suffix not in ENDINGS:
        raise InputError(f"{path} must end with {' or '.join(ENDINGS)}")
    if path.exists():
        raise InputError(f"{path} exists already; name a new file")
    signed_content = (as_html if path.suffix == ".html" else as_json)(content, secret)
    try:
        write_atomically(path, signed_content)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); name another file") from None


def verify(path: Path, public_key: str | None = None) -> tuple[bool, str]:
    """Whether a receipt is as it was signed, and the key: the one that it names, or the one given.

    Raises:
        InputError: the file is no receipt.
    """
    try:
        content = read_whole(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"cannot read receipt {path} ({error.strerror})") from None
    named, signature, body = _parts(path, content)
    key = public_key.strip().lower() if public_key is not None else named
    return named == key and signed(body, signature, key), key


def _parts(path, content):
    """(key, signature, what is signed) of a receipt."""
    if tail := re.search(TAIL.pattern + rb"\Z", content):
        return tail[1].decode(), tail[2].decode(), content[: tail.start()]
    try:
        kept = json.loads(content)
        key, signature, body = kept["public_key"], kept["signature"], _canonical(kept["receipt"])
        if content == _file(kept["receipt"], key, signature):  # nothing twice, nothing beside it
            return key, signature, body
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(f"{path} is no receipt, or its signature is cut off")


def _canonical(content):
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
