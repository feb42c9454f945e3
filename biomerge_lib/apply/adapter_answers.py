"""Knows how an adapter answers the very records that a run was scored on, decoded as the run was.

predictions of a run + shipped | an adapter's folder --[answer_like]--> the adapter's predictions, beside the run's
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from biomerge_lib.apply.ready_models import find_model
from biomerge_lib.core.errors import ParameterError
from biomerge_lib.core.records import Record
from biomerge_lib.decoding.predictions import (
    build_prompts,
    collect_predictions,
    read_predictions,
    write_predictions,
)
from biomerge_lib.experiment.runs import load_run_parameters, read_metrics
from biomerge_lib.experiment.stages import GREEDY
from biomerge_lib.model.adapters import CONFIG, SHIPPED
from biomerge_lib.report.comparison import find_predictions

CPU_SECONDS = 0.4  # of a sentence, by SmolLM2-135M on two cores (reports/threads.md)
log = logging.getLogger("biomerge")


def answer_adapters(places: Sequence[str], split: str, decoder: str) -> list[str]:
    """The places that ``compare`` is given, with a file of predictions for ``shipped`` and each adapter's folder.

    Raises:
        ParameterError: there is no run beside them, or the decoder is vLLM.
        DataError, ModelError: the run's predictions or the adapter cannot be read.
    """
    adapters = {place for place in places if place == "shipped" or (Path(place) / CONFIG).is_file()}
    if not adapters:
        return list(places)
    runs = [place for place in places if place not in adapters and Path(place).is_dir()]
    if not runs or decoder != "greedy":
        raise ParameterError(
            f"{', '.join(sorted(adapters))}: an adapter answers the records of a run, which is to be named too, and "
            "greedily alone: compare shipped runs/my-run"
        )
    return [str(answer_like(runs[0], split, place)) if place in adapters else place for place in places]


def answer_like(run: str, split: str, adapter: str) -> Path:
    """The file with an adapter's answers to the records of the run's 04_greedy_dev; they are decoded where it lacks.

    Its name holds a hash of the adapter, and one of the records and of what 04 decoded with.

    Raises:
        DataError, ModelError: see :func:`answer_adapters`.
    """
    own = find_predictions(run, split, "greedy")
    records = [
        Record(p.text, tuple(p.gold), p.doc_id, p.dataset, types=tuple(p.gold_types))
        for p in read_predictions(own)
    ]
    parameters = load_run_parameters(Path(run))
    scored = read_metrics(Path(run)).get("stages", {}).get(GREEDY, {}).get("metrics", {})
    folder, manifest = find_model(adapter=SHIPPED if adapter == "shipped" else adapter)
    dtype = scored.get("decode_dtype", parameters.greedy_dtype or parameters.dtype)
    constraint = scored.get("greedy_constrained_decoding", parameters.constrained_decoding)
    threshold = scored.get("greedy_span_threshold", parameters.span_threshold)
    new_tokens = max(manifest.max_new_tokens, parameters.max_new_tokens)
    key = sha256(repr((records, dtype, constraint, threshold, new_tokens)).encode()).hexdigest()[:8]
    out = own.with_name(f"{own.stem}-{folder.name}-{key}.jsonl")
    if out.is_file():
        return out
    import torch

    from biomerge_lib.decoding.greedy import greedy_decode, load_decoder
    from biomerge_lib.prompts.ner_span import cue_record
    from biomerge_lib.prompts.plain_tokenizer import load_plain_tokenizer

    wait = "" if torch.cuda.is_available() else f", about {CPU_SECONDS * len(records):.0f} s on two CPU cores"
    log.info("%s answers the %d %s sentences of %s, once%s", adapter, len(records), split, run, wait)
    cues = manifest.cue_options()
    asked = [cue_record(record, **cues) for record in records] if cues else records
    tokenizer = load_plain_tokenizer(folder)
    prompts = build_prompts(asked, tokenizer, manifest.prompt_format)
    how = {"dtype": dtype, "constrained_decoding": constraint}
    model = load_decoder(folder, eos_token_id=tokenizer.eos_token_id, **how)
    answers = greedy_decode(
        model,
        tokenizer,
        prompts,
        max_new_tokens=new_tokens,
        batch_size=parameters.per_device_eval_batch_size,
        constrained_decoding=constraint,
    )
    keeping = {"constrained": constraint != "off", "span_threshold": threshold}
    write_predictions(out, collect_predictions(asked, prompts, answers, **keeping))
    return out
