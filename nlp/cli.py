"""Commands for translation data, scores, checkpoints and language models. Heavy imports are deferred to the call."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from revnets.cli.plugins import one_line_errors

LABELS = {"tokenised": "tokenized"}
"""Labels of scores in the table, where they differ from the keys of `--json`."""


def prepare_mt(
    corpus: Annotated[
        list[str],
        typer.Argument(
            help="Built-in recipe (wmt16_en_de, wmt14_en_fr) or YAML file of a recipe; or a table of tab-separated "
            "text; or two files where line i translates line i. Text may be gzipped (.gz).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to create.", show_default=False, readable=False)
    ],
    languages: Annotated[
        str | None,
        typer.Option("--languages", "-l", help="Source and target, e.g. en-de or en-pt_BR.", show_default=False),
    ] = None,
    valid: Annotated[str | None, typer.Option(help="Number of pairs to draw for validation, or a text. (2000)")] = None,
    test: Annotated[str | None, typer.Option(help="Number of pairs to draw for the test, or a text. (2000)")] = None,
    fields: Annotated[
        str | None, typer.Option(help="Fields of a table with source and target, e.g. 2,3. (the last two)")
    ] = None,
    subword: Annotated[
        str | None,
        typer.Option(
            help="Subwords: sentencepiece (of raw text) or subword-nmt (of Moses' tokens). (sentencepiece; "
            "subword-nmt with --merges or --words)",
            show_default=False,
        ),
    ] = None,
    vocab: Annotated[
        int | None,
        typer.Option(help="Size of the joint vocabulary. (8000, or fewer for small texts)", show_default=False),
    ] = None,
    model_type: Annotated[str | None, typer.Option(help="Model of sentencepiece: unigram or bpe. (unigram)")] = None,
    character_coverage: Annotated[
        float | None, typer.Option(help="Share of characters that get a sentencepiece piece. (0.9995)")
    ] = None,
    merges: Annotated[
        int | None, typer.Option(help="Merge operations of subword-nmt, instead of --vocab. (10000)")
    ] = None,
    min_length: Annotated[int | None, typer.Option("--min", help="Minimum subwords per sentence. (1)")] = None,
    max_length: Annotated[int | None, typer.Option("--max", help="Maximum subwords per sentence. (250)")] = None,
    ratio: Annotated[float | None, typer.Option(help="Maximum length ratio of the two sides. (1.5)")] = None,
    words: Annotated[int | None, typer.Option(help="Maximum types in the dictionary, for subword-nmt. (all)")] = None,
    deduplicate: Annotated[
        bool | None,
        typer.Option(help="Drop repeated pairs, and training pairs that share a sentence with a drawn pair. (yes)"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes. (one per core, at most 16)", show_default=False)
    ] = None,
    downloads: Annotated[Path, typer.Option(help="Directory for the archives of a recipe.", readable=False)] = Path(
        "downloads"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a data set that was made in another way.")
    ] = False,
) -> None:
    """Prepare a fairseq data set from raw parallel text.

    Reads and checks all text, draws validation and test, learns joint
    subwords, cleans by length and ratio, and binarizes with a joint
    dictionary. Run the same command again to resume an interrupted run.

        revnets prepare-mt train.en train.de -l en-de -o data-bin/mine
        revnets prepare-mt table.tsv.gz -l en-zh --vocab 16000 -o data-bin/mine
        revnets prepare-mt train.en train.de -l en-de --subword subword-nmt -o data-bin/mine
        revnets prepare-mt wmt16_en_de -o data-bin/wmt16_en_de_bpe32k

    A text for --valid or --test is a table, or two files named as in
    dev.{lang}, where {lang} stands for both languages. Values in parentheses
    are the defaults without a recipe.
    """
    given = {
        "languages": languages,
        "valid": _count(valid),
        "test": _count(test),
        "fields": _numbers(fields),
        "subword": subword,
        "vocab": vocab,
        "model_type": model_type,
        "character_coverage": character_coverage,
        "merges": merges,
        "words": words,
        "deduplicate": deduplicate,
        "clean": {"min": min_length, "max": max_length, "ratio": ratio},
    }
    with reported():
        from .data.prepare import prepare
        from .data.recipe import read_recipe
        from .data.worker_pool import default_workers

        recipe, base = read_recipe(corpus, given)
        facts = prepare(recipe, output, base, downloads, workers or default_workers(), overwrite)
        _show(output, facts)


def average_checkpoints(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoints, or the --save-dir of a run.", show_default=False, readable=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Checkpoint to write.", show_default=False, readable=False)
    ],
    last: Annotated[int, typer.Option(min=1, help="Number of the newest checkpoints of a run.")] = 10,
    updates: Annotated[
        bool, typer.Option("--updates", help="Use the checkpoints of updates (checkpoint_1_5000.pt) instead of epochs.")
    ] = False,
) -> None:
    """Average the weights of several checkpoints of one run.

    Vaswani et al. (2017) average the last 5 or 20 checkpoints. fairseq-generate
    reads the result like any other checkpoint.
    """
    with reported():
        from revnets.cli.output import tracked

        from .evaluation.checkpoint_averaging import average, select_checkpoints

        paths = checkpoints
        if len(paths) == 1 and (paths[0].is_dir() or paths[0].suffix != ".pt"):
            paths = select_checkpoints(paths[0], last, updates)
        with tracked(paths, "average") as bar:
            average(bar, output)
    typer.echo(f"{output}: the average of {', '.join(path.name for path in paths)}")


def score_mt(
    generated: Annotated[
        Path,
        typer.Argument(
            help="Standard output of fairseq-generate or fairseq-interactive.",
            show_default=False,
            readable=False,
        ),
    ],
    language: Annotated[
        str,
        typer.Option("--language", "-l", help="Language of the translation, e.g. de or pt_BR.", show_default=False),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Untokenized reference, such as test.raw.de of prepare-mt.", show_default=False, readable=False
        ),
    ] = None,
    test_set: Annotated[
        str | None,
        typer.Option(
            help="sacrebleu test set to download as the reference, e.g. wmt14/full:en-de.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenize",
            help="sacreBLEU tokenizer, e.g. intl or flores200. (by language: zh, ja-mecab, ko-mecab, char or 13a)",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compute BLEU of a translation: tokenized, compound split, and sacreBLEU.

    English-German papers after Vaswani et al. (2017) report tokenized BLEU
    with compounds split. sacreBLEU of detokenized text is comparable between
    all systems. Tokenized BLEU needs output of fairseq-generate with
    --remove-bpe and without --tokenizer; for detokenized output, only
    sacreBLEU is computed.
    """
    with reported():
        from .data.corpus import TranslationError
        from .evaluation.bleu import named_reference, read_output, read_reference, scores
        from .evaluation.generated_output import LEFT_OUT
        from .evaluation.tokenizers import fallback, target_language

        code = target_language(language)
        if reference and test_set:
            raise TranslationError("--reference and --test-set exclude each other. Give one", code="conflicting-values")
        output = read_output(generated)
        lines = read_reference(reference) if reference else named_reference(test_set, code) if test_set else None
        found = scores(output, code, lines, tokenizer)
        warnings = [fallback(code)] if tokenizer is None else []
    if output.missing:
        missing = f"{output.missing} sentences of the data set have no translation and are not scored"
        warnings.append(f"{missing}: {LEFT_OUT}")
    if output.unfinished:
        warnings.append(f"{generated}: the last line of fairseq-generate is missing. The file may be truncated")
    for warning in filter(None, warnings):
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    if as_json:
        typer.echo(json.dumps({score.kind: score.value for score in found}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    form = "tokens" if output.tokenised else "detokenized text"
    title = Text(f"{generated}, {len(output.hypotheses)} sentences of {form}")
    table = Table(title=title, title_justify="left")
    table.add_column("BLEU")
    table.add_column("%", justify="right")
    table.add_column("n-grams, lengths and signature", overflow="fold")
    for score in found:
        table.add_row(LABELS.get(score.kind, score.kind), f"[bold]{score.value:.2f}[/bold]", score.detail)
    Console().print(table)


def _show(output: Path, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .data.binarization import unknown_words

    unknown = unknown_words(output)
    table = Table(title=Text(str(output)), title_justify="left", show_header=bool(unknown))
    table.add_column()
    table.add_column("number", justify="right")
    table.add_column("<unk>, %")
    for name, count in facts.items():
        if count:
            shares = ", ".join(f"{code} {share:.2f}" for code, share in unknown.get(name, {}).items())
            table.add_row(name, f"{count:,}", shares)
    Console().print(table)


def _count(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else text


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 20 and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r}: expected two numbers, counted from 1, such as 2,3", param_hint="--fields")
    return [int(part) for part in parts]


def _errors() -> tuple[type[Exception], ...]:
    from .data.corpus import TranslationError

    return (TranslationError,)


reported = partial(one_line_errors, _errors, extra="nlp")


def train_lm(
    config: Annotated[
        Path, typer.Argument(help="YAML file of the run configuration.", show_default=False, readable=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides as key.path=value, e.g. epochs=5 model.columns=8", show_default=False),
    ] = None,
) -> None:
    """Train a language model, or resume an interrupted run.

    The file has the keys of `revnets train`, with a model such as
    {hf: revcol_lm, hidden_size: 256, columns: 4}, and a text such as
    {train: texts/*.txt, val: 0.05, tokenizer: bytes, length: 256}.

    The best weights and the tokenizer are written to the directory model/ of
    the output, in the format of transformers.
    """
    with one_line_errors(_training_errors, extra="lm"):
        from .language_modeling.training import load_language_run, train_language_model

        outcome, folder = train_language_model(load_language_run(config, overrides or []))
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)
    if folder is not None:
        typer.echo(f"best {outcome.text}, {folder}")


def _training_errors() -> tuple[type[Exception], ...]:
    from .language_modeling.training import EXPECTED

    return EXPECTED


FOLDER = Path(__file__).resolve().parent


def user_dir() -> None:
    """Print the directory for fairseq's option --user-dir: --user-dir "$(revnets user-dir)"."""
    typer.echo(FOLDER)
