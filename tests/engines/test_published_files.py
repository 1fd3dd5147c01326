"""The files of a release as the Hub's cache has them, with what is odd about LongCat's, behind the stock server."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core.weights import checkpoint
from tests.cases import drafting_tensors
from tests.harness import engine
from tests.requests import CHAT, COMPLETIONS, MODEL
from tests.server import Server, serving, wait_until
from tests.speculation import CASE, NEW_TOKENS, prompts_of, steps_of, truth

END = {"id": "</longcat_s>", "ids": [2], "tokens": ["</longcat_s>"]}
PROMPT, DRAFT_TOKENS = prompts_of(CASE)[2], 2
ANSWER = truth(CASE, PROMPT, NEW_TOKENS, DRAFT_TOKENS).tokens
STOP = next(token for place, token in enumerate(ANSWER) if place >= 3 and token not in ANSWER[:place])
TEXT = "What does a zero expert cost?"


def publish(directory: Path) -> Path:
    """A checkpoint as a release has it; the path of its snapshot in a cache of the Hub."""
    files = directory / "files"
    make_checkpoint(files, CASE.config, seed=0, dtype=torch.float32)
    for file in files.glob("model*"):
        file.unlink()
    tensors = drafting_tensors(CASE.config)
    mtp = {name: tensors.pop(name) for name in list(tensors) if name.startswith("model.mtp.")}
    checkpoint.save(tensors, files, max_shard_size=300_000)
    save_file(mtp, files / checkpoint.AUXILIARY_NAME, {"format": "pt"})
    change(files / "config.json", auto_map={"AutoConfig": "configuration_longcat_flash.LongcatFlashConfig"})
    change(files / "generation_config.json", eos_token_id=[2, STOP], top_k=1)
    change(files / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    # As transformers saves a tokenizer that it has read with `add_eos_token`.
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END["id"], "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": END["id"], "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {END["id"]: END}}
    change(files / "tokenizer.json", post_processor=template)
    return snapshot_of(files, directory / "hub")


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def snapshot_of(files: Path, cache: Path) -> Path:
    """As `huggingface_hub` keeps a repository: blobs, and links to them. Nothing can be written there, but by root."""
    blobs, snapshot = (cache / "models--org--longcat" / name for name in ("blobs", f"snapshots/{'0' * 40}"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in files.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/blob-of-{file.name}")
        file.rename(blobs / f"blob-of-{file.name}").chmod(0o444)
    for folder in (blobs, snapshot):
        folder.chmod(0o555)
    return snapshot


def state_of(snapshot: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change, of all that is in a repository of the cache."""
    entries = sorted(snapshot.parents[1].rglob("*"))
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in entries}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def before(snapshot: Path) -> dict[str, tuple[int, int]]:
    return state_of(snapshot)


@pytest.fixture(scope="module")
def server(snapshot: Path, before: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [*engine.command(snapshot, served_name=MODEL), *engine.speculation_flags(DRAFT_TOKENS)]
    assert "trust" not in " ".join(map(str, command))
    with serving(command, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


def test_it_is_read_whether_the_index_names_the_auxiliary_file_or_not(snapshot: Path, tmp_path: Path) -> None:
    assert engine.configure(snapshot, **engine.speculation(DRAFT_TOKENS)) == CASE.config
    for file in snapshot.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((tmp_path / checkpoint.INDEX_NAME).read_text())
    mtp = [name for name in CASE.published() if name.startswith("model.mtp.")]
    change(
        tmp_path / checkpoint.INDEX_NAME, weight_map=index["weight_map"] | dict.fromkeys(mtp, checkpoint.AUXILIARY_NAME)
    )
    assert engine.configure(tmp_path, **engine.speculation(DRAFT_TOKENS)) == CASE.config
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "model_type" not in raw
    assert "auto_map" in raw


def answer(server: Server, path: str, **request: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "max_tokens": 4, "return_token_ids": True, **request}
    whole: dict[str, Any] = server.http.post(path, json=asked).raise_for_status().json()
    return whole["choices"][0] | whole


def test_a_prompt_is_not_ended_before_its_answer(server: Server, snapshot: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(snapshot)
    assert tokenizer.encode(TEXT)[-1] == 2, "the files do end it"
    text = tokenizer.encode(TEXT, add_special_tokens=False)
    assert answer(server, COMPLETIONS, prompt=TEXT)["prompt_token_ids"] == text
    assert answer(server, COMPLETIONS, prompt=[TEXT])["prompt_token_ids"] == text
    user = {"role": "user", "content": TEXT}
    rendered = tokenizer.encode(f"[Round 0] USER:{TEXT} ASSISTANT:", add_special_tokens=False)
    assert answer(server, CHAT, messages=[user])["prompt_token_ids"] == rendered
    begun = {"messages": [user, {"role": "assistant", "content": "It costs"}]}
    begun |= {"continue_final_message": True, "add_generation_prompt": False}
    continued = answer(server, CHAT, **begun)["prompt_token_ids"]
    assert tokenizer.decode(continued).endswith("ASSISTANT:It costs")


def test_the_drafter_has_the_embedding_that_is_stored_for_it_and_says_so(server: Server) -> None:
    """It is in a file that the index does not name. More than a few drafts are accepted with this one alone."""
    said = [line for line in server.log.read_text().splitlines() if "embed_tokens.weight differs from" in line]
    assert len(said) == 1, said
    names = list(engine.speculation_metrics([]))
    before = {name: server.metric(name, 0.0) for name in names}
    request = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    assert answer(server, COMPLETIONS, **request)["token_ids"] == ANSWER
    wanted = engine.speculation_metrics(steps_of(CASE, PROMPT, NEW_TOKENS, DRAFT_TOKENS))
    wait_until(lambda: all(server.metric(name) - before[name] == wanted[name] for name in names))


def test_generation_config_is_used(server: Server) -> None:
    """Of its best token alone, where a chat says nothing of sampling (SGLang leaves completions to the request); and of
    a second token at which answers end."""
    chat = answer(server, CHAT, messages=[{"role": "user", "content": TEXT}], max_tokens=NEW_TOKENS, ignore_eos=True)
    tokens = chat.get("token_ids") or chat["response_token_ids"]  # vLLM's name, or SGLang's
    assert tokens == truth(CASE, chat["prompt_token_ids"], NEW_TOKENS, DRAFT_TOKENS).tokens
    cut = answer(server, COMPLETIONS, prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0)
    assert cut["finish_reason"] == "stop"
    assert cut["token_ids"] == ANSWER[: ANSWER.index(STOP) + 1]


def test_nothing_is_written_beside_the_checkpoint(server: Server, snapshot: Path, before: dict[str, Any]) -> None:
    """A test of root's, whom no mode of a directory stops."""
    answer(server, COMPLETIONS, prompt=PROMPT)
    assert state_of(snapshot) == before
