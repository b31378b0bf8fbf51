"""Settings: read, overridden, refused."""

import os
from pathlib import Path

import pytest

from spectral_kernels import cli
from spectral_kernels.files.reading import FileError
from spectral_kernels.training.config import Config, flat, parse_strategy
from spectral_kernels.training.settings import build_config, named_configs, read_config


@pytest.mark.parametrize("name", sorted({"demo", "fashion_mnist", "tiny", *named_configs()}))
def test_shipped_configs_are_valid(name: str) -> None:
    config = read_config(name)
    assert build_config(config.to_dict()) == config


def test_overrides() -> None:
    words = ["train.steps=7", "optimizer.lr=1e-4", "compare.strategies=[random, greedy-4]", "augment.flip=0"]
    config = read_config("tiny", words)
    assert (config.train.steps, config.optimizer.lr) == (7, 1e-4)
    assert config.compare.strategies == ("random", "greedy-4")
    assert config.augment.flip == 0.0
    budget = read_config("tiny", ["train.steps=null", "train.seconds=3"]).train
    assert (budget.steps, budget.seconds) == (None, 3.0)


def test_data_sets_have_their_own_augmentations() -> None:
    assert read_config("tiny").augment.flip == 0.0
    assert read_config("tiny", ["data.name=fashion_mnist"]).augment.flip == 0.5
    assert read_config("tiny", ["augment.flip=0.25"]).augment.flip == 0.25


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 3}\nevaluate:\n")
    assert read_config(path).train.steps == 3
    path.write_text("")
    assert read_config(str(path), ["train.steps=1000"]) == build_config({"train": {"steps": 1000}})


@pytest.mark.parametrize(
    "content, message",
    [
        ("train: {stpes: 3}", r"unknown key train\.stpes; did you mean train\.steps\?"),
        ("steps: 3", r"unknown key steps; did you mean train\.steps\?"),
        ("optimiser: {lr: 1}", r"unknown key optimiser; did you mean optimizer\?"),
        ("zzz: 1", "unknown key zzz; the sections are data, augment"),
        ("train: 3", "train must be a section of key: value, got 3"),
        ("- 3", "must hold a mapping, got list"),
        ("train: [", "not valid YAML"),
        ("train: {steps: !!python/object/apply:os.getcwd []}", "not valid YAML"),
        ("train: {steps: soon}", r"train\.steps must be a whole number, got 'soon'"),
        ("train: {steps: 1.5}", r"train\.steps must be a whole number, got 1\.5"),
        ("train: {steps: true}", r"train\.steps must be a whole number, got True"),
        ("train: {steps: 3, amp: 1}", r"train\.amp must be true or false, got 1"),
        ("optimizer: {lr: fast}", r"optimizer\.lr must be a number, got 'fast'"),
        ("model: {encoder: 4}", r"model\.encoder must be text, got 4"),
        ("train: {steps: 0}", r"train\.steps must be at least 1, got 0"),
        ("train: {steps: 5, seconds: 5}", r"exactly one of train\.steps and train\.seconds"),
        ("train: {batch_size: 8}", r"exactly one of train\.steps and train\.seconds"),
        ("train: {steps: 5, temperature: 0}", r"train\.temperature must be a finite number above 0, got 0"),
        ("train: {steps: 5, batch_size: 1}", r"train\.batch_size must be at least 2, got 1"),
        ("train: {steps: 5, batch_size: 32, accumulate: 5}", r"train\.(batch_size|accumulate)"),
        ("train: {steps: 5, batch_size: 4, accumulate: 4}", r"train\.(batch_size|accumulate)"),
        ("train: {steps: 5, accumulate: 0}", r"train\.accumulate"),
        ("train: {steps: 5, device: tpu}", r"train\.device must be one of auto, cpu, cuda, got 'tpu'"),
        ("optimizer: {lr: .nan}", r"optimizer\.lr must be a finite number above 0, got nan"),
        ("optimizer: {name: lamb}", r"optimizer\.name must be one of sgd, lars, adamw, got 'lamb'"),
        ("optimizer: {warmup: 1}", r"optimizer\.warmup must be in \[0, 1\), got 1"),
        ("model: {dim: 0}", r"model\.dim must be at least 1, got 0"),
        ("data: {name: imagenet}", r"data\.name must be one of fashion_mnist, digits, cifar10, .*, got 'imagenet'"),
        ("data: {long_tail: 0.1}", r"data\.long_tail must be at least 1, got 0\.1"),
        ("data: {duplicates: 1}", r"data\.duplicates must be in \[0, 1\), got 1"),
        ("augment: {flip: 2}", r"augment\.flip must be in \[0, 1\], got 2"),
        ("augment: {crop_scale: [0.5]}", r"augment\.crop_scale must hold 2 values, got \[0\.5\]"),
        ("augment: {crop_scale: 0.5}", r"augment\.crop_scale must be a list such as \[a, b\], got 0\.5"),
        ("evaluate: {every: 0}", r"evaluate\.every must be at least 1, got 0"),
        ("evaluate: {train_images: 100}", r"evaluate\.train_images must be at least 200, got 100"),
        ("selection: {strategy: greedy}", "unknown strategy 'greedy'"),
        ("selection: {strategy: pool-low+window}", r"needs selection\.window=\[low, high\]"),
        ("selection: {window: [5, 3]}", r"selection\.window must be \(low, high\)"),
        ("selection: {min_seen: 2}", r"selection\.min_seen must be in \[0, 1\], got 2"),
        ("compare: {seeds: [1, 1]}", r"compare\.seeds must be one or more different values"),
        ("compare: {seeds: [-1]}", r"compare\.seeds must be at least 0, got -1"),
        ("compare: {strategies: []}", r"compare\.strategies must be one or more different values"),
        ("compare: {strategies: [random, best]}", "unknown strategy 'best'"),
        ("compare: {target_share: 0}", r"compare\.target_share must be above 0 and at most 1, got 0"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_packaged_configs_go_by_name_and_by_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_config("tiny.yaml") == read_config("tiny")
    Path("tiny.yaml").write_text("train: {steps: 7}")
    assert read_config("tiny.yaml").train.steps == 7
    assert read_config("tiny").train.steps != 7
    with pytest.raises(FileNotFoundError, match=r"no config 'there/tiny\.yaml'"):
        read_config("there/tiny.yaml")


def test_bad_overrides() -> None:
    with pytest.raises(ValueError, match=r"must look like train\.steps=500, got 'faster'"):
        read_config("tiny", ["faster"])
    with pytest.raises(ValueError, match=r"unknown key train\.step; did you mean train\.steps"):
        read_config("tiny", ["train.step=3"])
    with pytest.raises(FileNotFoundError, match="no config 'tinny': name a YAML file or one of cifar10_moco"):
        read_config("tinny")


@pytest.mark.parametrize(
    "name, kind, policy, candidates, window",
    [
        ("random", "random", None, None, False),
        ("pool-low", "pool", "low", None, False),
        ("pool-0.25", "pool", 0.25, None, False),
        ("pool-high+window", "pool", "high", None, True),
        ("greedy-16", "greedy", None, 16, False),
        ("greedy-all", "greedy", None, None, False),
        ("random+whiten", "random", None, None, False),
        ("pool-low+window+whiten", "pool", "low", None, True),
    ],
)
def test_strategies(name: str, kind: str, policy: object, candidates: int | None, window: bool) -> None:
    strategy = parse_strategy(name)
    assert (strategy.name, strategy.kind, strategy.candidates, strategy.window) == (name, kind, candidates, window)
    assert policy is None or strategy.policy == policy
    assert strategy.whiten == name.endswith("+whiten")


@pytest.mark.parametrize(
    "name",
    [
        "", "Random", "random+window", "pool", "pool-best", "pool-1.5", "greedy-0", "greedy-x", "greedy-8+wind",
        "greedy-8+", "greedy-8+window", "live-8+window", "pool-low+whiten+window", "greedy-8+whiten+whiten",
    ],
)  # fmt: skip
def test_bad_strategies(name: str) -> None:
    with pytest.raises(ValueError, match="unknown strategy"):
        parse_strategy(name)


def test_flat_has_every_setting() -> None:
    names = flat(Config().to_dict())
    assert names["train.steps"] == 1000
    assert names["compare.seeds"] == [0, 1]


HOSTILE = {
    "alias bomb": ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]", "an alias in line 2: write the value out"),
    "itself": ("train: &t {steps: *t}", "an alias in line 1"),
    "merge": ("a: &a {steps: 1}\ntrain: {<<: *a}", "an alias in line 2"),
    "twice": ("train: {steps: 1}\ntrain: {steps: 2}", "the key 'train' stands twice in the section in line 1"),
    "twice within": ("train:\n  steps: 1\n  seed: 1\n  steps: 2", "the key 'steps' stands twice in the section in line 2"),
    "deep": ("train: " + "[" * 3000 + "]" * 3000, "nested deeper than 20 levels in line 1"),
    "deep in blocks": ("\n".join(" " * i + "a:" for i in range(300)), "nested deeper than 20 levels in line 20"),
    "digits": ("train: {steps: " + "9" * 5000 + "}", "is not valid YAML: Exceeds the limit"),
    "400 digits": ("train: {steps: " + "9" * 400 + "}", r"train\.steps must be at most 2147483647, got a number of 1329 bits"),
    "400 digits of a float": ("optimizer: {lr: " + "9" * 400 + "}", "optimizer.lr must be a finite number above 0, got inf"),
    "many digits of a text": ("optimizer: {lr: '" + "9" * 400 + "e9'}", "optimizer.lr must be a finite number above 0"),
    "seeds": ("compare: {seeds: [" + "9" * 400 + "]}", r"compare\.seeds must be at most"),
    "count": ("train: {steps: 5, batch_size: 1000000000000000000}", r"train\.batch_size must be at most 2147483647"),
    "long text": ("selection: {strategy: " + "x" * 20_000 + "}", "unknown strategy 'xxx"),
    "long list": ("train: {steps: [" + "1, " * 5_000 + "1]}", r"train\.steps must be a whole number, got \[1, 1"),
    "long key": ("x" * 20_000 + ": 1", "unknown key xxx|is not valid YAML"),
    "number as key": ("1: 2", "unknown key 1"),
    "list as key": ("? [a, b]\n: 1", "is not valid YAML"),
    "code": ("train: !!python/object/apply:os.system [true]", "is not valid YAML"),
    "date": ("train: {steps: 2020-01-01}", r"train\.steps must be a whole number, got datetime\.date"),
    "bad date": ("train: {steps: 2020-99-99}", "is not valid YAML"),
    "nan": ("optimizer: {weight_decay: .nan}", r"optimizer\.weight_decay must be at least 0, got nan"),
    "negative": ("train: {steps: -" + "9" * 50 + "}", r"train\.steps must be at least 1, got a number of"),
    "base 60": ("train: {steps: 1:2:3:" + "1:" * 100 + "1}", "is not valid YAML|must be"),
    "null character": ("train: {steps: \0}", "is not valid YAML"),
    "binary": ("train: {steps: !!binary AAAA}", r"train\.steps must be a whole number, got b"),
    "set": ("train: !!set {steps}", "must be a section|got None|exactly one|must be"),
    "two documents": ("a: 1\n---\nb: 2", "is not valid YAML"),
    "unfinished": ("train: {steps: 1", "is not valid YAML"),
    "directive": ("%YAML 99.0\n---\na: 1", "is not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_are_one_clear_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = HOSTILE[name]
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_config(path)
    assert cli.main(["train", "--config", str(path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 1100


def test_settings_files_that_are_none(tmp_path: Path) -> None:
    for content, message in (
        (b"\xff\xfe\x00", "is no UTF-8 text"),
        (b"a" * (2**16 + 1), "is larger than the 65536 bytes"),
    ):
        (tmp_path / "a.yaml").write_bytes(content)
        with pytest.raises(FileError, match=message):
            read_config(tmp_path / "a.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(FileError, match="is a pipe, not a file"):
        read_config(tmp_path / "pipe.yaml")
    with pytest.raises(FileError, match="is a folder, not a file"):
        read_config(tmp_path)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbftrain: {steps: 7}")
    assert read_config(tmp_path / "bom.yaml").train.steps == 7


@pytest.mark.parametrize("setting", ["model.width=2147483647", "model.hidden=2147483647", "moco.queue=2147483647"])
def test_more_than_the_memory_is_one_clear_line(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", "tiny", "--no-monitor", "--out", str(tmp_path), setting, "train.steps=20"]
    assert cli.main([*words, "train.method=moco"]) == 1
    said = capsys.readouterr().err
    assert "not enough memory for these settings" in said and said.count("\n") == 1
