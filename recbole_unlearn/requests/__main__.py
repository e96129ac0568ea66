"""Command line of the queue: ``python -m recbole_unlearn.requests``."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from recbole_unlearn.errors import InputError
from recbole_unlearn.requests import receipts
from recbole_unlearn.requests.queue import KINDS, STATES, WAITING, Queue
from recbole_unlearn.storage.files import now


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 all is well; 1 a receipt is not what was signed, or a request of those served has failed; 2 what
    was asked for cannot be done.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command is not _serve:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if argv is None:  # RecBole reads them
        sys.argv[1:] = []
    logging.disable(logging.INFO)
    try:
        return args.command(args, rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m recbole_unlearn.requests",
        description="A queue of deletion requests: take them in, serve them, give receipts.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str, queue: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(command=run)
        if queue:
            added.add_argument("db", metavar="DB", help="file of the queue")
        return added

    add = command("add", _add, "take a request in; the first one makes the queue, and its key file")
    _name_tokens(add, required=True)
    add.add_argument("--id", help="of the request, which names nobody (default: a random one)")
    add.add_argument(
        "--received", metavar="DATE", help="when it came, if not now: YYYY-MM-DD; due is counted from then"
    )
    add.add_argument("--due", type=int, default=30, metavar="DAYS", help="until it must be done (default: 30)")
    listed = command("list", _list, "the requests and what became of them")
    listed.add_argument("--state", choices=STATES)
    listed.add_argument("--show", action="store_true", help="with the tokens of those that are not done")
    removed = command(
        "remove", _remove, "withdraw a request that is pending or failed; that it was there stays on record"
    )
    removed.add_argument("id", metavar="ID")
    serve = command("serve", _serve, "forget all that is pending, in one batch; keys of run_unlearn.py as --key=value")
    serve.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="to begin with; the queue then goes on")
    serve.add_argument("--output_dir", required=True, metavar="DIR", help="each batch makes a folder in it")
    serve.add_argument("--audit", metavar="FILE", help="audit record of all batches (default: DB.audit.jsonl)")
    serve.add_argument("--reset", action="store_true", help="begin anew with CHECKPOINT, which was trained since")
    receipt = command("receipt", _receipt, "a signed receipt of a request that is done")
    receipt.add_argument("id", metavar="ID")
    _name_tokens(receipt, required=False)
    receipt.add_argument("--out", type=Path, metavar="FILE", help="a new .html or .json file (default: JSON, printed)")
    verify = command("verify-receipt", _verify, "is a receipt as it was signed, and by whom?", queue=False)
    verify.add_argument("file", type=Path, metavar="FILE")
    verify.add_argument("--key", metavar="PUB", help="the public key that it must be signed by")
    for each in (add, serve, receipt):
        each.add_argument("--key_file", metavar="FILE", help="the operator's secret (default: DB.key)")
    return parser


def _name_tokens(parser, required):
    named = parser.add_mutually_exclusive_group(required=required)
    what = "" if required else "name it in the receipt: "
    named.add_argument("--user", metavar="TOKEN", help=f"{what}all interactions of a user")
    named.add_argument("--item", metavar="TOKEN", help=f"{what}all interactions of an item")
    named.add_argument("--pair", nargs=2, metavar=("USER", "ITEM"), help=f"{what}those of a user with an item")


def _tokens(args) -> tuple[str, list[str]]:
    """(kind, tokens) that a command names; nothing where it names none."""
    for kind in KINDS:
        if (value := getattr(args, kind)) is not None:
            return kind, value if kind == "pair" else [value]
    return "", []


def _key_file(args):
    return Path(args.key_file or f"{args.db}.key")


def _add(args, _):
    with Queue(args.db, _key_file(args), new=True) as queue:
        print(queue.add(*_tokens(args), args.id, args.due, args.received))
    return 0


def _remove(args, _):
    with Queue(args.db) as queue:
        print(queue.withdraw(args.id))
    return 0


def _list(args, _):
    with Queue(args.db) as queue:
        found = queue.requests(args.state)
    moment, rows = now(), [["id", "kind", "received", "due", "state", *(["tokens"] if args.show else []), ""]]
    for each in found:
        late = each["state"] in WAITING and each["due"] < moment
        notes = ["OVERDUE"] * late + [each["reason"]] * bool(each["reason"])
        notes += [f"{each['done']}, {each['interactions']} interactions"] if each["done"] else []
        shown = [each["tokens"] or ""] if args.show else []
        rows.append([*(each[key] for key in ("id", "kind", "received", "due", "state")), *shown, "; ".join(notes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _serve(args, rest):
    import recbole_unlearn

    recbole_unlearn.register()
    from recbole_unlearn.requests.serving import serve  # which loads torch and numba, for seconds
    from recbole_unlearn.settings.given import read_arguments

    keys = read_arguments(rest)
    with Queue(args.db, _key_file(args)) as queue:
        trail, before = args.audit or f"{args.db}.audit.jsonl", _failed(queue)
        print(serve(queue, args.output_dir, trail, args.checkpoint, keys, args.reset))
        return int(bool(_failed(queue) - before))


def _failed(queue):
    return {each["id"] for each in queue.requests("failed")}


def _receipt(args, _):
    with Queue(args.db, _key_file(args)) as queue:
        content = receipts.receipt(queue, args.id, *_tokens(args))
        if args.out is None:
            print(receipts.as_json(content, queue.secret).decode(), end="")
        else:
            receipts.write(args.out, content, queue.secret)
            print(f"{args.out}: signed by {queue.secret.public_key}")
    return 0


def _verify(args, _):
    whole, key = receipts.verify(args.file, args.key)
    if not whole:
        print(f"{args.file}: NOT as it was signed by {key}")
        return 1
    print(
        f"{args.file}: as it was signed by {key}" + ("" if args.key else "; compare with the operator's published key")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
