"""Bad input, one named case each, through the command line: one clear line, status 2, and no byte changed on disk.

What a single module refuses is tested with that module; here is what a user, or a folder from somebody else, can give
to a whole run: a case is how to break a finished run's folder, further arguments, and words of the message.
"""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_USER, inside

import run_unlearn as command_line
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.storage import inter_file, triple_log
from recbole_unlearn.storage import purging as purge

INTER, ITEM = Path("data/tiny/tiny.inter"), Path("data/tiny/tiny.item")
MODEL, LOG = Path("model.pth"), Path("model.triples")
VICTIM = Path("elsewhere/other.inter")
FORM = {"separator": "\t", "encoding": "utf-8", "fields": ["user_id", "item_id"]}


def snapshot(root="."):
    """Everything below a folder: path -> bytes of a file, target of a link, None for a folder."""
    found = {}
    for each in Path(root).rglob("*"):
        found[each] = os.readlink(each) if each.is_symlink() else each.read_bytes() if each.is_file() else None
    return found


@pytest.fixture(scope="module")
def scene(finished, data_path, tmp_path_factory):
    """A trained model, what was unlearned from it, and the data; beside them somebody else's file and log."""
    folder = tmp_path_factory.mktemp("bad input")
    shutil.copytree(data_path, folder / "data")
    for name in ("model.pth", "unlearned.pth"):
        shutil.copy(finished[1] / name, folder / name)
        shutil.copytree(triple_log.log_path(finished[1] / name), triple_log.log_path(folder / name))
    for name in ("audit.jsonl", "audit.jsonl.key"):
        shutil.copy(finished[1] / name, folder / name)
    (folder / "elsewhere").mkdir()
    (folder / VICTIM).write_text("user_id:token\titem_id:token\na\tb\nc\td\n")
    return folder


# -- ways to break it


def edit(change, path=MODEL):
    """A way to break a checkpoint: ``change`` gets its content, to change it in place."""

    def work():
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return work


def weights(value):
    """Another tensor in place of the user embeddings."""

    def change(state):
        old = state["state_dict"]["user_embedding.weight"]
        state["state_dict"]["user_embedding.weight"] = value(old)

    return edit(change)


def configured(**keys):
    """Other settings in a checkpoint's configuration."""
    return edit(lambda state: state["config"].update(keys))


def optimizer(**keys):
    """Other hyperparameters in a checkpoint's optimiser."""
    return edit(lambda state: state["optimizer"]["param_groups"][0].update(keys))


def metadata(change):
    def work():
        content = json.loads((LOG / "metadata.json").read_text())
        change(content)
        (LOG / "metadata.json").write_text(json.dumps(content))

    return work


def column(name, change):
    """A column of the log that is another one, its checksum with it."""

    def work():
        changed = change(np.load(LOG / name))
        np.save(LOG / name, changed)
        metadata(lambda content: content["crc32"].update({name: triple_log.crc32(changed)}))()

    return work


def written(path, content):
    def work():
        Path(path).unlink(missing_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return work


def cut(path, share):
    def work():
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: int(len(content) * share)])

    return work


def flipped(path, needle, offset=0):
    """One bit of a file is another one, near the first occurrence of ``needle``."""

    def work():
        content = bytearray(Path(path).read_bytes())
        content[content.index(needle) + offset] ^= 1
        Path(path).write_bytes(content)

    return work


def pipe(path):
    return lambda: os.mkfifo(path)


def linked(path, target):
    """A file or folder that is a link to a copy of it elsewhere."""

    def work():
        shutil.move(path, target)
        os.symlink(Path(target).absolute(), path)

    return work


def replaced(path, other):
    """Another file or folder in place of this one."""

    def work():
        shutil.rmtree(path) if Path(path).is_dir() else os.remove(path)
        shutil.copytree(other, path) if Path(other).is_dir() else shutil.copy(other, path)

    return work


def weight_bit():
    """One bit of the stored weights flipped: torch itself does not notice."""
    state = torch.load(MODEL, weights_only=True)
    stored = state["state_dict"]["user_embedding.weight"][1].numpy().tobytes()
    flipped(MODEL, stored, 1)()


def compressed():
    """The same checkpoint, its parts compressed: of some kilobytes could come gigabytes."""
    with zipfile.ZipFile(MODEL) as old:
        parts = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(MODEL, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, content)


def bomb(path):
    """A file that claims to be, and sparsely is, of more bytes than anybody wants to read."""

    def work():
        Path(path).unlink()
        with open(path, "wb") as f:
            f.truncate(1 << 36)
        os.truncate(path, 17 << 20)

    return work


class Hostile:
    def __reduce__(self):
        return open, (str(Path("ran").absolute()), "w")


def hostile_column():
    """A column that is a pickle, which would run on loading."""
    array = np.empty(1, object)
    array[0] = Hostile()
    with open(LOG / "epoch-00000.npy", "wb") as f:
        np.save(f, array, allow_pickle=True)


def journal(name=".model.pth.purge", **keys):
    """A forged purge journal, as it may lie in a folder from elsewhere."""

    def work():
        content = {"inter": str(VICTIM.absolute()), "format": FORM, "pairs": [["a", "b"]], "seal": [1, 2, 3], **keys}
        Path(name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return work


def guessed():
    """A forged journal that knows all of a seal but the kernel's clock."""
    size, inode, _ = inter_file.seal(VICTIM)
    journal(seal=[size, inode, VICTIM.stat().st_mtime_ns])()


def audit_line(change):
    def work():
        lines = Path("audit.jsonl").read_text().splitlines()
        Path("audit.jsonl").write_text("\n".join(change(lines)) + "\n")

    return work


def requests(*lines):
    return written("requests.csv", "\n".join(lines) + "\n")


SERVED = ["--requests=requests.csv"]
TIMES = "--load_col={'inter':['user_id','item_id','timestamp']}"
TRAINED = [
    "--checkpoint=None",
    "--compare=None",
    "--epochs=1",
    "--train_batch_size=97",
    "--model=BPR",
    "--dataset=tiny",
]
COMPARED = [*TRAINED, "--methods=retrain"]
AUDITED = ["--audit=./audit.jsonl"]


def nothing():
    pass


# name: (how to break it, further arguments, words of the message)
CASES = {
    # the checkpoint
    "checkpoint cut in the middle": (cut(MODEL, 0.5), [], "cannot be read"),
    "checkpoint without its last byte": (cut(MODEL, 0.9999), [], "cannot be read"),
    "checkpoint of no bytes": (written(MODEL, b""), [], "cannot be read"),
    "checkpoint of other bytes": (written(MODEL, bytes(range(256)) * 99), [], "cannot be read"),
    "checkpoint that is text": (written(MODEL, "weights: 3"), [], "cannot be read"),
    "checkpoint with a flipped bit among its weights": (weight_bit, [], "checksum"),
    "checkpoint with compressed parts": (compressed, [], "compressed"),
    "checkpoint that is a hostile pickle": (written(MODEL, pickle.dumps(Hostile())), [], "cannot be read"),
    "checkpoint with a hostile pickle inside": (
        edit(lambda s: s.update(other_parameter=Hostile())), [], "cannot be read",
    ),
    "checkpoint that is a tensor": (lambda: torch.save(torch.ones(3), MODEL), [], "no RecBole checkpoint"),
    "checkpoint of a dangling link": (lambda: (MODEL.unlink(), os.symlink("gone.pth", MODEL)), [], "does not exist"),
    "checkpoint of a link to itself": (lambda: (MODEL.unlink(), os.symlink(MODEL, MODEL)), [], "does not exist"),
    "checkpoint that is a pipe": (lambda: (MODEL.unlink(), os.mkfifo(MODEL)), [], "no plain file"),
    "weights with NaN": (weights(lambda w: w.index_fill(0, torch.tensor([3]), float("nan"))), [], "NaN"),
    "weights of whole numbers": (weights(lambda w: w.to(torch.int64)), [], "do not fit"),
    "weights of half precision": (weights(lambda w: w.half()), [], "do not fit"),
    "weights of complex numbers": (weights(lambda w: w.to(torch.complex64)), [], "damaged"),
    "weights of another shape": (weights(lambda w: w[:, :3].clone()), [], "do not fit"),
    "weights that are sparse": (weights(lambda w: w.to_sparse()), [], "damaged"),
    "weights that claim a terabyte": (weights(lambda w: torch.zeros(1).expand(1 << 38)), [], "damaged"),
    "weights of no device": (weights(lambda w: torch.empty(w.shape, device="meta")), [], "damaged"),
    "a weight too many": (edit(lambda s: s["state_dict"].update(bias=torch.ones(3))), [], "do not fit"),
    "a weight missing": (edit(lambda s: s["state_dict"].pop("item_embedding.weight")), [], "do not fit"),
    "optimiser without groups": (edit(lambda s: s["optimizer"].update(param_groups=[])), [], "damaged"),
    "optimiser without state": (edit(lambda s: s["optimizer"].pop("state")), [], "damaged"),
    "optimiser of text": (optimizer(lr="fast"), [], "damaged"),
    "optimiser with a learning rate of NaN": (optimizer(lr=float("nan")), [], "damaged"),
    "optimiser with one beta": (optimizer(betas=[0.9]), [], "damaged"),
    "optimiser whose averages have another shape": (
        edit(lambda s: s["optimizer"]["state"][0].update(exp_avg_sq=torch.ones(3))),
        ["--method=influence"], "optimiser",
    ),
    "optimiser that took no step": (
        edit(lambda s: s["optimizer"]["state"][0].update(step=torch.tensor(0.0))),
        ["--method=influence"], "optimiser",
    ),
    "configuration of an unknown model": (configured(model="Nonsense"), [], "Nonsense"),
    "configuration of a model in a path": (configured(model="../BPR"), [], "damaged"),
    "configuration of a data set in a path": (configured(dataset="../../elsewhere/other"), [], "damaged"),
    "configuration with a batch size of text": (configured(train_batch_size="many"), [], "train_batch_size"),
    "configuration with a seed of text": (configured(seed="dice"), [], "seed"),
    "configuration without an embedding size": (configured(embedding_size=None), [], "embedding_size"),
    "configuration without cutoffs": (configured(topk=None), [], "topk"),
    "configuration with negatives of text": (configured(train_neg_sample_args="two"), [], "train_neg_sample_args"),
    "checkpoint of more epochs than its log": (edit(lambda s: s["triple_log"].update(epochs=99)), [], "different runs"),
    "checkpoint of epochs that are true": (edit(lambda s: s["triple_log"].update(epochs=True)), [], "damaged"),
    # its log
    "log of the unlearned model": (replaced(LOG, "unlearned.triples"), [], "different runs"),
    "log that is a file": (lambda: (shutil.rmtree(LOG), LOG.write_text("log")), [], "triple log"),
    "log folder that is empty": (lambda: (shutil.rmtree(LOG), LOG.mkdir()), [], "triple log"),
    "metadata cut in the middle": (cut(LOG / "metadata.json", 0.5), [], "metadata.json"),
    "metadata of many megabytes": (bomb(LOG / "metadata.json"), [], "too large"),
    "metadata nested without end": (written(LOG / "metadata.json", "[" * 300_000), [], "metadata.json"),
    "metadata with a number of many digits": (
        written(LOG / "metadata.json", '{"rows": 1' + "0" * 9000 + "}"), [], "metadata",
    ),
    "metadata that claims a billion rows": (metadata(lambda m: m.update(rows=10**9)), [], "metadata.json says"),
    "metadata that claims a billion epochs": (
        metadata(lambda m: m.update(n_epochs=10**9, order=None)), [], "triple log",
    ),
    "metadata that claims parameters of negative size": (
        metadata(lambda m: m.update(parameters=[["user_embedding.weight", [-5, 8]]])), [], "triple log",
    ),
    "metadata that names a column outside": (
        metadata(lambda m: m["crc32"].update({"../unlearned.pth": 1})), [], "outside",
    ),
    "metadata that names an archive as a column": (
        lambda: (np.savez(LOG / "a.npz", a=np.ones(3)), metadata(lambda m: m["crc32"].update({"a.npz": 1}))()),
        [], "a.npz",
    ),
    "log that is an archive of columns": (
        lambda: (np.savez(LOG / "b", a=np.ones(3)), os.replace(LOG / "b.npz", LOG / "users.npy")), [], "users.npy",
    ),
    "column that is a hostile pickle": (hostile_column, [], "epoch-00000.npy"),
    "column cut in the middle": (cut(LOG / "epoch-00001.npy", 0.5), [], "epoch-00001.npy"),
    "column with a flipped bit": (
        lambda: flipped(LOG / "items.npy", np.load(LOG / "items.npy")[5:20].tobytes())(), [], "checksum",
    ),
    "column of wider numbers": (column("items.npy", lambda c: c.astype(np.int64)), [], "metadata.json says"),
    "column of a user who does not exist": (
        column("users.npy", lambda c: np.append(c[:-1], c.dtype.type(250))), [], "ids",
    ),
    "snapshot with infinity": (column("weights-00000.npy", lambda c: np.full_like(c, np.inf)), [], "NaN or infinite"),
    "column behind a link out of the folder": (linked(LOG / "users.npy", "elsewhere/users.npy"), [], "link"),
    # the data set
    "data set of another name": (nothing, ["--dataset=other"], "was trained with dataset"),
    "data set that is not there": (nothing, ["--data_path=nowhere"], "cannot load data set"),
    "data set cut in the middle": (cut(INTER, 0.5), [], "was written for"),
    "data set of no bytes": (written(INTER, b""), [], "cannot load data set"),
    "data set without its header": (written(INTER, "u1\ti1\t3\n"), [], "cannot load data set"),
    "data set in another order": (
        lambda: INTER.write_text("\n".join([(lines := INTER.read_text().splitlines())[0], *lines[:0:-1]])),
        [], "another data set",
    ),
    "data set of a model's bytes": (replaced(INTER, MODEL), [], "cannot load data set"),
    # forged purge journals
    "journal that names lines of a foreign file": (journal(), [], "is not as it was when a purge began here"),
    "journal with a guessed seal": (guessed, [], "is not as it was when a purge began here"),
    "journal without a seal": (journal(seal=...), [], "no purge journal"),
    "journal that names the user's own data": (
        lambda: journal(inter=str(INTER.absolute()), pairs=[INTER.read_text().splitlines()[1].split("\t")[:2]])(),
        [], "is not as it was when a purge began here",
    ),
    "journal that names a file that is no data": (journal(inter="/etc/hostname"), [], "no purge journal"),
    "journal that names a number": (journal(inter=5), [], "no purge journal"),
    "journal of an unknown encoding": (journal(format={**FORM, "encoding": "secret"}), [], "no purge journal"),
    "journal whose pairs are numbers": (journal(pairs=[[1, 2]]), [], "no purge journal"),
    "journal whose pairs are lists": (journal(pairs=[[["a"], "b"]]), [], "no purge journal"),
    "journal without a format": (journal(format=...), [], "no purge journal"),
    "journal nested without end": (written(".model.pth.purge", "[" * 300_000), [], "no purge journal"),
    "journal of other bytes": (written(".model.pth.purge", b"\xff\xfe\x00"), [], "no purge journal"),
    "journal that would purge a folder": (
        journal(".elsewhere.purge", inter=None), ["--output_dir=."], "no checkpoint file",
    ),
    "journal of a neighbour in the folder": (
        journal(".other.pth.purge"), [], "is not as it was when a purge began here",
    ),
    "journal in the output folder": (
        lambda: (Path("out").mkdir(), journal("out/.model.pth.purge")()),
        [], "is not as it was when a purge began here",
    ),
    # forged audit files
    "audit file with a changed count": (
        audit_line(lambda lines: [lines[0].replace('"interactions": 25', '"interactions": 24'), *lines]),
        AUDITED, "chain",
    ),
    "audit file of another program": (written("audit.jsonl", '{"time": 3}\n'), AUDITED, "no audit record"),
    "audit file nested without end": (written("audit.jsonl", "[" * 300_000 + "\n"), AUDITED, "no audit record"),
    "audit file that is a folder": (nothing, ["--audit=./elsewhere"], "audit"),
    "audit file in no folder": (nothing, ["--audit=gone/audit.jsonl"], "audit"),
    "audit file that is a data set": (nothing, [f"--audit={INTER}"], ".inter too"),
    # requests
    "request for an unknown user": (nothing, ["--forget_count=None", "--forget_users=nobody"], "nobody"),
    "request for the padding user": (nothing, ["--forget_count=None", "--forget_users=[PAD]"], "[PAD]"),
    "request for a nested list": (nothing, ["--forget_count=None", "--forget_users=[[1,2],[3]]"], "unknown user"),
    "request for a ratio of everything": (nothing, ["--forget_count=None", "--forget_ratio=1"], "forget_ratio"),
    "request for a ratio of 10 to the 300": (nothing, ["--forget_count=None", "--forget_ratio=1e300"], "forget_ratio"),
    "request for a ratio of NaN": (nothing, ["--forget_count=None", "--forget_ratio=nan"], "forget_ratio"),
    "request for a ratio of nearly everything": (
        nothing, ["--forget_count=None", "--forget_ratio=0.99999999"], "nothing would be left",
    ),
    "request for too many": (nothing, ["--forget_count=100000000000000000000"], "forget_count"),
    "request for two things": (nothing, [f"--forget_users={SECRET_USER}"], "exactly one"),
    "request for what is forgotten already": (
        nothing, ["--checkpoint=unlearned.pth", "--forget_count=None", "--forget_file=pairs.tsv"], "no training",
    ),
    "request of a negative seed": (nothing, ["--forget_seed=-1"], "forget_seed"),
    "request for a seed of text": (nothing, ["--forget_seed=dice"], "forget_seed"),
    "request for a time that ends first": (nothing, ["--forget_count=None", "--forget_time=5..4"], "ends before"),
    "request for a category of no column": (
        nothing, ["--forget_count=None", "--forget_category=c1", "--forget_category_field=mood"], "must name",
    ),
    "request file of requests without header": (requests("u17,i3"), SERVED, "user,item"),
    "request file that is empty": (written("requests.csv", ""), SERVED, "user,item"),
    "request file of a header only": (requests("user,item"), SERVED, "holds no request"),
    "request file of other bytes": (written("requests.csv", b"\xff\xfe\x00\x01"), SERVED, "cannot read"),
    "request file with a NUL": (requests("user,item", "u17\0,"), SERVED, "u17"),
    "request file with an open quote": (requests("user,item", '"u17,'), SERVED, "cannot read"),
    "request file of an unknown user": (requests("user,item", "u17,", "nobody,"), SERVED, "nobody"),
    "request file of nobody and nothing": (requests("user,item", ","), SERVED, "holds no request"),
    "request file of three columns too many": (requests("user,item", "u17,i3,4,5,6"), SERVED, "line 2"),
    "request file of mixed times": (requests("user,item,time", "u17,,5", "u20,,2020-01-01"), SERVED, "time"),
    "request file of a field without end": (requests("user,item", "u" * 200_000 + ","), SERVED, "cannot read"),
    "request file that is a folder": (nothing, ["--requests=elsewhere"], "cannot read"),
    "requests of nothing at once": (requests("user,item", "u17,"), [*SERVED, "--request_batch=0"], "request_batch"),
    # keys
    "misspelt key": (nothing, ["--forget_cuont=3"], "did you mean"),
    "key given twice": (nothing, ["--forget_count=4", "--forget_count=5"], "twice"),
    "misspelt choice": (nothing, ["--method=replya"], "did you mean"),
    "unlearned parameters of numbers": (nothing, ["--unlearn_params=[1,2]"], "unlearn_params"),
    "unlearned parameters of nothing": (nothing, ["--unlearn_params=[]"], "unlearn_params"),
    "replay of some parameters": (nothing, ["--unlearn_params=['user*']", "--method=replay"], "unlearn_params"),
    "waiting time of no seconds": (nothing, ["--rank_timeout=0"], "rank_timeout"),
    "waiting time of text": (nothing, ["--rank_timeout=long"], "rank_timeout"),
    "waiting time of centuries": (nothing, ["--rank_timeout=100000000000000000000"], "rank_timeout"),
    "processes of text": (nothing, ["--nproc=two"], "nproc"),
    "processes of a half": (nothing, ["--nproc=1.5"], "nproc"),
    "processes of none": (nothing, ["--nproc=0"], "nproc"),
    "processes that are more than the world": (nothing, ["--nproc=3", "--world_size=2"], "world_size"),
    "processes at no port": (nothing, ["--nproc=2", "--port=99999"], "port"),
    "configuration file that is the checkpoint": (nothing, ["--config_files=model.pth"], "model.pth"),
    "configuration file of aliases without end": (
        written("bomb.yaml", "a: &a [x,x]\n" + "".join(f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
                for a, b in zip("abcdefghi", "bcdefghij", strict=True)) + "forget_count: *j\n"),
        ["--config_files=bomb.yaml"], "bomb.yaml",
    ),
    "configuration file nested without end": (
        written("deep.yaml", "a: " + "[" * 2_000), ["--config_files=deep.yaml"], "deep.yaml",
    ),
    "output folder that is in use": (nothing, ["--output_dir=elsewhere"], "output_dir"),
    "output folder with a NUL": (nothing, ["--output_dir=a\0b"], "output_dir"),
    "output folder with a name too long": (nothing, ["--output_dir=" + "a" * 300], "a" * 300),
    "purge of a data set alone": (nothing, ["--purge_dataset=True"], "purge: True"),
    "purge of a data set that a checkpoint misnames": (
        edit(lambda s: s.update(data={"inter": str(VICTIM.absolute())})),
        ["--purge=True", "--purge_dataset=True"], "model.triples/data/tiny is not there",
    ),
    "purge after a comparison of methods": (nothing, [*COMPARED, "--purge=True"], "methods purges nothing"),
    "purge after a comparison of models": (
        nothing, [*TRAINED, "--compare_models=Pop", "--purge=True"], "compare_models purges nothing",
    ),
    "purge after an experiment": (
        nothing, [*TRAINED, "--forget_count=None", "--experiment=paper", "--purge=True"], "experiment purges nothing",
    ),
    "purge of a data set after an experiment": (
        nothing, [*TRAINED, "--forget_count=None", "--experiment=paper", "--purge_dataset=true"], "purge_dataset out",
    ),
    "purge after measuring fidelity": (
        nothing, [*TRAINED, "--evaluate=fidelity", "--purge=True"], "fidelity purges nothing",
    ),
    "purge of a data set after measuring fidelity, by a file": (
        written("purge.yaml", "purge: True\npurge_dataset: True\n"),
        [*TRAINED, "--evaluate=fidelity", "--config_files=purge.yaml"], "leave purge and purge_dataset out",
    ),
    # comparisons and training
    "method that is unknown": (nothing, [*TRAINED, "--methods=retrain,scfi"], "did you mean"),
    "methods of numbers": (nothing, [*TRAINED, "--methods=[1]"], "methods"),
    "settings of a method that is unknown": (nothing, [*COMPARED, "--method_args={'foo':{}}"], "foo"),
    "settings of a method that are text": (nothing, [*COMPARED, "--method_args=fast"], "method_args"),
    "setting that a method has not": (nothing, [*COMPARED, "--method_args={'fine_tune':{'epoch':3}}"], "did you mean"),
    "setting of another kind": (nothing, [*COMPARED, "--method_args={'fine_tune':{'epochs':'few'}}"], "epochs"),
    "models to compare that are unknown": (nothing, [*TRAINED, "--compare_models=LihgtGCN"], "LihgtGCN"),
    "comparison of a checkpoint": (nothing, ["--methods=all"], "leave checkpoint out"),
    "sets of a comparison that name nobody": (
        nothing, [*COMPARED, "--forget_count=None", "--comparison_sets=users:5"], "KIND:VALUE",
    ),
    "seeds of a comparison that are none": (nothing, [*COMPARED, "--comparison_seeds=0"], "comparison_seeds"),
    "experiment that is unknown": (
        nothing, [*TRAINED, "--forget_count=None", "--experiment=papre"], "did you mean 'paper'",
    ),
    "experiment with a forget set": (nothing, [*TRAINED, "--experiment=paper"], "forget_count"),
    "training with an embedding of no numbers": (nothing, [*TRAINED, "--embedding_size=0"], "embedding_size"),
    "training with an embedding of text": (nothing, [*TRAINED, "--embedding_size=big"], "embedding_size"),
    "training in batches of nothing": (
        nothing, ["--checkpoint=None", "--train_batch_size=0"], "train_batch_size",
    ),
    "training with a learning rate of text": (nothing, [*TRAINED, "--learning_rate=fast"], "learning_rate"),
    "training with a negative learning rate": (nothing, [*TRAINED, "--learning_rate=-1"], "learning_rate"),
    "training with weight decay of NaN": (nothing, [*TRAINED, "--weight_decay=nan"], "weight_decay"),
    "training with a seed of text": (nothing, [*TRAINED, "--seed=dice"], "seed"),
    "training for a half epoch": (nothing, ["--checkpoint=None", "--epochs=0.5"], "epochs"),
    # values that RecBole checks late or never
    **{
        f"training with {arguments[-1].removeprefix('--')[:60]}": (nothing, [*TRAINED, *arguments], says)
        for arguments, says in [
            (["--topk=1.5"], "topk"),
            (["--topk=[5,'a']"], "<="),
            (["--changed_lists=999"], "changed_lists: 999 is more than the"),
            (["--changed_lists=-1"], "changed_lists"),
            (["--embeddings=True", "--model=NeuMF"], "embeddings is for BPR and LightGCN"),
            (["--changed_lists=5", "--model=GRU4Rec", TIMES, "--loss_type=BPR"], "changed_lists"),
            (["--valid_metric=MRR@999", "--topk=999"], "topk: 999 is more than the"),
            (["--metrics=['AUC']", "--valid_metric=AUC", "--eval_args={'mode':'labeled'}"], "AUC judges predicted"),
            (["--eval_args={'mode':'labeled'}"], "labeled"),
            (["--eval_args={'mode':'uni-5'}"], "mode of valid"),
            (["--eval_args={'split':{'RS':[-0.8,0.1,0.1]}}"], "split RS"),
            (["--eval_args={'split':{'RS':[0.8,0.2]}}"], "split RS"),
            (["--eval_args={'split':{'RS':'most'}}"], "split RS"),
            (["--eval_args={'split':{'LS':'some'}}"], "split LS"),
            (["--eval_args={'order':'XX'}"], "order"),
            (["--eval_args={'group_by':'city'}"], "group_by"),
            (["--eval_args={'splits':{'RS':[8,1,1]}}"], "eval_args has no 'splits'"),
            (["--train_neg_sample_args={'distribution':'uniform','sample_num':-1}"], "sample_num"),
            (["--train_neg_sample_args={'distribution':'uniform','sample_num':1,'alpha':'x'}"], "alpha"),
            (["--train_neg_sample_args={'distribution':'uniform','samples':1}"], "has no 'samples'"),
            (["--clip_grad_norm=big"], "clip_grad_norm"),
            (["--clip_grad_norm={'max_norm':'x'}"], "clip_grad_norm"),
            (["--clip_grad_norm={'max_norm':1,'norm':2}"], "clip_grad_norm has no norm"),
            (["--metric_decimal_place=four"], "metric_decimal_place"),
            (["--loss_decimal_place=x"], "loss_decimal_place"),
            (["--show_progress=maybe"], "show_progress"),
            (["--shuffle=maybe"], "shuffle"),
            (["--enable_amp=1"], "enable_amp"),
            (["--normalize_all=maybe"], "normalize_all"),
            (["--user_inter_num_interval=lots"], "user_inter_num_interval"),
            (["--item_inter_num_interval=[5,2]"], "item_inter_num_interval"),
            (["--val_interval={'timestamp':'late'}"], "val_interval of timestamp"),
            (["--zzz=3"], "unknown key 'zzz'"),
            (["--state=loud"], "state must be one of"),
            (["--worker=-1"], "worker"),
            (["--embedding_size=100000000"], "embedding_size"),
            (["--encoding=utf-99"], "encoding"),
            (["--rm_dup_inter=middle"], "rm_dup_inter"),
            (["--transform=upside"], "transform"),
            (["--load_col=5"], "load_col"),
            (["--load_col={inter: [user_id, item_id]}"], "write it as in Python"),
            (["--tail_ratio=x"], "tail_ratio"),
            (["--log_wandb=True"], "wandb"),
            (["--log_wandb=please"], "log_wandb"),
            (["--dataset=ti\nny"], "dataset must be a name"),
            (["--dataset=../tiny"], "dataset must be a name"),
            (["--output_dir="], "output_dir"),
            (["--model=BPRR"], "did you mean 'BPR'"),
            (["--model=LightGCN", "--n_layers=abc"], "n_layers"),
            (["--model=LightGCN", "--n_layers=-1"], "n_layers"),
            (["--model=LightGCN", "--n_layers=2.5"], "n_layers"),
            (["--model=NGCF", "--hidden_size_list=64"], "hidden_size_list"),
        ]
    },
    "request file that has no end": (nothing, ["--forget_count=None", "--forget_file=/dev/zero"], "no plain file"),
    "request file that is a pipe": (pipe("p"), ["--forget_count=None", "--forget_file=p"], "no plain file"),
    "requests from a pipe": (pipe("p"), ["--requests=p"], "no plain file"),
    "configuration that has no end": (nothing, ["--config_files=/dev/zero"], "no plain file"),
    "configuration from a pipe": (pipe("p"), ["--config_files=p"], "no plain file"),
    "audit file that is a device": (nothing, ["--audit=/dev/full"], "no plain file"),
    "audit file that is a pipe": (pipe("p"), ["--audit=./p"], "no plain file"),
    "data set that is a pipe": (lambda: (INTER.unlink(), os.mkfifo(INTER)), [], "no plain file"),
    "output below a device": (nothing, ["--output_dir=/dev/null/x"], "/dev/null/x"),
    "output in the kernel's files": (nothing, ["--output_dir=/proc/x"], "/proc/x"),
    "request for nobody": (nothing, ["--forget_count=None", "--forget_users=[]"], "names nobody"),
    "request for nothing at all": (nothing, ["--forget_count=None"], "a checkpoint forgets nothing by itself"),
    "training with an unknown optimiser": (nothing, [*TRAINED, "--learner=adma"], "learner"),
    "training in time without times": (
        nothing, [*TRAINED, "--load_col={'inter':['user_id','item_id']}", "--eval_args={'order':'TO'}"],
        "eval_args: order TO orders interactions by timestamp, which load_col does not load",
    ),
    "sequential training without times": (
        nothing, [*TRAINED, "--model=FPMC", "--load_col={'inter':['user_id','item_id']}"],
        "FPMC orders interactions by timestamp, which load_col does not load; give load_col: {'inter':",
    ),
    "training without a patience": (nothing, [*TRAINED, "--stopping_step=never"], "stopping_step"),
}  # fmt: skip


USUAL = {
    "--checkpoint": "model.pth", "--data_path": "data", "--forget_count": "3", "--compare": "none",
    "--output_dir": "out", "--show_progress": "False", "--state": "ERROR", "--use_gpu": "False",
}  # fmt: skip


def start(arguments):
    """Status of the command line with the usual arguments, but for those that are given; ``=None`` leaves one out."""
    named = {argument.partition("=")[0] for argument in arguments}
    if "--requests" in named:
        named.add("--forget_count")
    usual = [f"{key}={value}" for key, value in USUAL.items() if key not in named]
    return command_line.main([*usual, *(each for each in arguments if not each.endswith("=None"))])


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_changes_nothing(scene, tmp_path, capsys, name):
    break_it, arguments, says = CASES[name]
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene"):
        if "pairs.tsv" in " ".join(arguments):
            forgotten_pairs(scene)
        break_it()
        before = snapshot()
        capsys.readouterr()
        status = start(arguments)
        out, err = capsys.readouterr()
        assert status == 2, out
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert says in err and "Traceback" not in err
        assert len(err) < 1000 and out == ""
        assert snapshot() == before


def forgotten_pairs(scene):
    """What the finished run's unlearned model has forgotten, by name, from the two logs."""
    logs = [triple_log.TripleLog.open(scene / f"{name}.triples") for name in ("model", "unlearned")]
    whole, left = (set(zip(log.users.tolist(), log.items.tolist(), strict=True)) for log in logs)
    user, item = min(whole - left)
    tokens = {"user_id": [], "item_id": []}
    for line in INTER.read_text().splitlines()[1:]:
        for field, token in zip(tokens, line.split("\t"), strict=False):
            if token not in tokens[field]:
                tokens[field].append(token)
    Path("pairs.tsv").write_text(f"{tokens['user_id'][user - 1]}\t{tokens['item_id'][item - 1]}\n")


IN_AUDIT, IN_FIDELITY, IN_PAPER = {"evaluate": "audit"}, {"evaluate": "fidelity"}, {"experiment": "paper"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {**IN_AUDIT, "forget_users": ["u17"]},
            "forget_users is for .*; leave forget_users out, and give comparison_sets",
        ),
        ({**IN_AUDIT, "forget_ratio": 0.0025}, "leave forget_ratio out"),
        ({**IN_AUDIT, "comparison_seeds": 3}, "not for evaluate: audit; leave comparison_seeds out"),
        ({**IN_AUDIT, "coupling": "fresh"}, "leave coupling out"),
        ({**IN_AUDIT, "compare": "none"}, "leave compare out"),
        ({**IN_AUDIT, "methods": "ours", "method_args": {"ours": {"method": "influence"}}}, "leave ours out"),
        (
            {**IN_AUDIT, "methods": "rrl", "method_args": {"scif": {"damping": 1.0}}},
            "scif is not among the methods rrl",
        ),
        ({**IN_FIDELITY, "methods": "rrl"}, "methods is for .*, not for evaluate: fidelity; leave methods out"),
        ({**IN_FIDELITY, "compare_models": "Pop"}, "leave compare_models out"),
        ({**IN_FIDELITY, "comparison_sets": "count:9"}, "leave comparison_sets out"),
        ({**IN_FIDELITY, "method_args": {"rrl": {}}}, "leave method_args out"),
        ({**IN_FIDELITY, "paper": True}, "leave paper out"),
        ({**IN_FIDELITY, "method": "replay"}, "leave method out"),
        ({**IN_FIDELITY, "audit_models": 16}, "audit_models is for evaluate: audit, not for evaluate: fidelity"),
        ({"methods": "ours", "method": "influence"}, "not for methods; leave method out, and give method_args"),
        ({"methods": "ours", "fidelity_seeds": 4}, "leave fidelity_seeds out"),
        ({"methods": "ours", "comparison_sets": "count:9", "forget_users": ["u17"]}, "leave it out, or forget_users"),
        ({"compare_models": "Pop", "changed_lists": 3}, "not for compare_models; leave changed_lists out"),
        ({"compare_models": "Pop", "drift_every": 3}, "leave drift_every out"),
        ({"compare_models": "Pop", "audit": "record.jsonl"}, "leave audit out"),
        ({**IN_PAPER, "forget_items": ["i3"]}, "leave forget_items out"),
        ({**IN_PAPER, **IN_FIDELITY}, "leave evaluate out"),
        ({**IN_PAPER, "embeddings": True}, "leave embeddings out"),
        ({"forget_count": 9, "comparison_sets": "count:9"}, "not for a run of one model; leave comparison_sets out"),
        ({"forget_count": 9, "fidelity_seeds": 4}, "leave fidelity_seeds out"),
        ({"forget_count": 9, "method_args": {"ours": {}}}, "leave method_args out"),
    ],
)
def test_what_a_run_does_nothing_with_is_refused_before_any_work(make_options, tmp_path, keys, said):
    cache = {"comparison_cache": str(tmp_path / "cache"), "fidelity_cache": str(tmp_path / "cache")}
    with pytest.raises(InputError, match=said) as refused:
        run_unlearn("BPR", "tiny", config_dict=make_options(output_dir=str(tmp_path / "out"), **cache, **keys))
    assert "\n" not in str(refused.value) and not list(tmp_path.glob("*/*"))


def test_there_are_more_cases_than_were_promised():
    assert len(CASES) > 60


def test_the_unbroken_scene_runs(scene, tmp_path):
    """Else the cases could be refused for another reason."""
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene"):
        assert start([]) == 0
        assert Path("out/unlearned.pth").is_file()


def test_a_purge_journal_of_this_machine_still_works(scene, tmp_path):
    """What makes forged ones fail must not make true ones fail."""
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene"):
        journal(seal=inter_file.seal(VICTIM))()
        assert purge.recover(MODEL)
        assert VICTIM.read_text() == "user_id:token\titem_id:token\nc\td\n"
        assert not MODEL.exists() and not LOG.exists()


def test_a_forged_purge_journal_deletes_nothing_behind_a_link(scene, tmp_path):
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene"):
        shutil.move(LOG, "elsewhere/log")
        os.symlink("elsewhere/log", LOG)
        journal(inter=None)()
        before = snapshot("elsewhere")
        assert purge.recover(MODEL)
        assert snapshot("elsewhere") == before and not LOG.is_symlink()


def test_a_pending_log_behind_a_link_is_not_taken_nor_touched(scene, tmp_path):
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene"):
        run_id = torch.load(MODEL, weights_only=True)["triple_log"]["run_id"]
        shutil.move(LOG, "elsewhere/log")
        os.symlink(Path("elsewhere/log").absolute(), f".model.triples.{run_id}.pending")
        before = snapshot("elsewhere")
        with pytest.raises(InputError, match="none at model.triples"):
            checkpoint.load(MODEL)
        checkpoint.settle(MODEL, checkpoint.read(MODEL))
        assert snapshot("elsewhere") == before


def test_the_hostile_pickle_of_the_cases_would_run(tmp_path):
    with inside(tmp_path):
        pickle.loads(pickle.dumps(Hostile())).close()
        assert Path("ran").exists()
