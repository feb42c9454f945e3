"""Knows how an adapter answers the very records that a run was scored on, decoded as the run was.

predictions of a run + shipped | an adapter's folder --[answer_adapters]--> the adapter's predictions, beside the run's
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from biomerge_lib.apply.ready_models import find_manifest, find_model
from biomerge_lib.core.errors import ParameterError
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.greedy import greedy_decode
from biomerge_lib.decoding.predictions import (
    build_prompts,
    collect_predictions,
    read_predictions,
    write_predictions,
)
from biomerge_lib.experiment.recorded import load_run_parameters, read_metrics
from biomerge_lib.experiment.stages import GREEDY
from biomerge_lib.model.adapters import CONFIG
from biomerge_lib.model.unsloth_lora_ner import load_causal_lm
from biomerge_lib.prompts.ner_span import cue_record
from biomerge_lib.prompts.tokenizer import load_tokenizer
from biomerge_lib.report.comparison import find_predictions

log = logging.getLogger("biomerge")


def answer_adapters(places: Sequence[str], split: str, decoder: str) -> list[str]:
    """The places that ``compare`` is given, with a predictions file for ``shipped`` and each adapter's folder.

    It holds the adapter's answers to the records of the first run's 04_greedy_dev, which are decoded where it lacks.
    Its name has a hash of the adapter, and one of the records and of what 04 decoded with.

    Raises:
        ParameterError: there is no run among the places, or the decoder is vLLM.
        DataError, ModelError: the run's predictions or an adapter cannot be read.
    """
    adapters = [place for place in places if place == "shipped" or (Path(place) / CONFIG).is_file()]
    runs = [place for place in places if place not in adapters and Path(place).is_dir()]
    if adapters and not (runs and decoder == "greedy"):
        raise ParameterError(
            f"{adapters[0]} answers, greedily, what a run was scored on: compare {adapters[0]} runs/my-run"
        )
    return [str(_answer(place, runs[0], split)) if place in adapters else place for place in places]


def _answer(adapter: str, run: str, split: str) -> Path:
    own, parameters = find_predictions(run, split, "greedy"), load_run_parameters(Path(run))
    records = [
        Record(one.text, tuple(one.gold), one.doc_id, one.dataset, types=tuple(one.gold_types))
        for one in read_predictions(own)
    ]
    given = None if adapter == "shipped" else adapter
    folder, manifest = find_model(adapter=given), find_manifest(adapter=given)
    scored = read_metrics(Path(run)).get("stages", {}).get(GREEDY, {}).get("metrics", {})
    dtype = scored.get("decode_dtype", parameters.greedy_dtype or parameters.dtype)
    constraint = scored.get("greedy_constrained_decoding", parameters.constrained_decoding)
    threshold = scored.get("greedy_span_threshold", parameters.span_threshold)
    limits: dict[str, Any] = {
        "max_new_tokens": max(manifest.max_new_tokens, parameters.max_new_tokens),
        "batch_size": parameters.per_device_eval_batch_size,
    }
    key = sha256(repr((records, dtype, constraint, threshold, limits)).encode()).hexdigest()[:8]
    out = own.with_name(f"{own.stem}-{folder.name}-{key}.jsonl")
    if out.is_file():
        return out
    took = (
        f", which took {scored['decode_seconds']:.0f} s in 04_greedy_dev"
        if "decode_seconds" in scored
        else ""
    )
    log.info("%s answers, once, the %d %s sentences of %s%s", adapter, len(records), split, run, took)
    if cues := manifest.cue_options():
        records = [cue_record(record, **cues) for record in records]
    tokenizer = load_tokenizer(folder)
    prompts = build_prompts(records, tokenizer, manifest.prompt_format)
    model = load_causal_lm(folder, dtype=dtype)
    answers = greedy_decode(model, tokenizer, prompts, constrained_decoding=constraint, **limits)
    keeping = {"constrained": constraint != "off", "span_threshold": threshold}
    write_predictions(out, collect_predictions(records, prompts, answers, **keeping))
    return out
