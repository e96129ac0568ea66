"""Command line of recbole_unlearn."""

import argparse
import gc
import sys


def main(argv=None):
    if argv is None:  # what is imported stays: to look for garbage in it, over and over, takes half a second
        gc.disable()
    from recbole_unlearn.distributed import OtherRankFailed
    from recbole_unlearn.errors import InputError
    from recbole_unlearn.settings.keys import KEYS

    options = "\n".join(
        f"  --{name}={'' if key.default is None else key.default}\n      ({key.kind}) {key.meaning}"
        for name, key in KEYS.items()
    )
    parser = argparse.ArgumentParser(
        description="Train a RecBole model (or take --checkpoint), make it forget, and compare with retraining.",
        epilog=f"keys of recbole_unlearn, with their defaults:\n{options}\n\nAny key of RecBole is accepted likewise.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-m", "--model", help="RecBole model (default: BPR, or the checkpoint's)")
    parser.add_argument("-d", "--dataset", help="RecBole data set (default: the bundled ml-100k, or the checkpoint's)")
    parser.add_argument("--config_files", help='YAML files, separated by spaces: "a.yaml b.yaml"')
    parser.add_argument(
        "--requests", help="CSV file of deletion requests to serve one after the other (forget_requests)"
    )
    parser.add_argument("--quick", action="store_true", help="with --experiment=paper: a small version (quick)")
    args, rest = parser.parse_known_args(argv)
    if argv is None:  # loggers send it: Weights & Biases does
        sys.argv[1:] = []
    try:
        overrides = {"forget_requests": args.requests} if args.requests is not None else {}
        overrides |= {"quick": True} if args.quick else {}
        from recbole_unlearn.quick_start import run_unlearn
        from recbole_unlearn.settings.given import read_arguments

        overrides = read_arguments(rest, overrides)
        if argv is None:
            gc.freeze()
        gc.enable()
        result = run_unlearn(args.model, args.dataset, (args.config_files or "").split(), overrides)
    except OtherRankFailed:  # which has said why
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is None:  # rank 0 says it
        return 0
    print(f"\n{result.page}")
    for name, path in result["files"].items():
        print(f"{name}: {path}")
    if argv is None:  # nor at the end
        gc.freeze()
    return 0


if __name__ == "__main__":
    sys.exit(main())
