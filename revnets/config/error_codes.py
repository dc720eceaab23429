"""The codes of all errors: short names that stay when the wording of an error changes, for programs and tests."""

from __future__ import annotations

VALUES = {
    "invalid-value": "a value cannot be used, for a reason that has no code of its own",
    "unknown-key": "a key or an option that does not exist",
    "missing-key": "a required key or option is missing",
    "reserved-key": "a key that must not be set here, because something else decides it",
    "wrong-type": "a value of another type, such as text for a list",
    "number-as-text": "text that looks like a number where a number is needed, such as `1e-3` in YAML",
    "not-finite": "a number that is infinite or not a number",
    "out-of-range": "a number that is too small or too large",
    "too-large": "more values, nesting, files or bytes than a configuration may have",
    "wrong-length": "a list with too few or too many items",
    "unknown-choice": "a word that is none of the choices",
    "not-divisible": "a size that must be a multiple of another one",
    "conflicting-values": "values that are valid, but not together",
    "invalid-syntax": "text that does not follow the format that is needed, such as YAML or a checksum",
    "invalid-override": "an override `key.path=value` that has another form or leads to no key",
    "circular-reference": "a base file or a value that contains itself",
    "missing-shape": "no shape of the input is given, and the model does not state one",
}
COMPONENTS = {
    "unknown-component": "a block, fusion, stem or head that does not exist",
    "missing-module": "the module in `package.module:Class` does not exist",
    "import-failed": "the module in `package.module:Class` exists, but importing it fails",
    "invalid-component": "a class or function that cannot serve as the component or model that is needed",
    "not-trusted": "a configuration names code or a file that may only be used if the user trusts it",
    "component-failed": "a component, model or optimizer refuses its options",
    "name-clash": "two things have the same name",
    "unknown-model": "a model that does not exist",
    "no-columns": "the model has no reversible columns, or too few of them",
    "no-spec": "the model is not described by a specification",
    "input-rejected": "the model does not accept an input of this shape",
    "shape-mismatch": "tensors, levels or layers whose shapes do not fit together",
    "no-gradient": "nothing in the model requires a gradient",
    "unusable-device": "the device does not exist or cannot be used",
    "missing-dependency": "a Python package is not installed",
}
MEMORY = {
    "over-budget": "no plan fits the memory budget",
    "missing-budget": "the plan was made without a memory budget",
    "weights-sharded": "the weights are sharded already, so that a training step cannot be simulated",
    "changed-in-place": "a tensor that backward needs was changed in place",
    "not-coupled": "a cell returns without calling its coupling, so that there is no state to rebuild",
    "buffer-lost": "a large buffer was written for the first time after it had been taken for read-only",
    "output-changed": "a cell returns something else than the state that its coupling made",
    "early-replay": "backward reached a cell whose forward pass was not over",
    "replay-mismatch": "a cell saves other tensors in its replay than in its forward pass",
    "state-mismatch": "a state that backward rebuilt differs from that of the forward pass",
}
FILES = {
    "missing-file": "a file or folder does not exist",
    "not-a-file": "a folder, a pipe or a device where a file is needed",
    "not-a-folder": "something else where a folder is needed, such as a file or a link to nowhere",
    "empty-file": "the file is empty",
    "unreadable-file": "the file cannot be opened",
    "invalid-encoding": "the text is not encoded as UTF-8",
    "damaged-file": "the file is truncated or damaged",
    "wrong-format": "the file holds something else than what is needed",
    "unsafe-file": "the file holds objects other than plain data, which loading would execute",
    "unwritable-file": "the file cannot be written",
    "file-exists": "the file to be written exists already",
    "unknown-suffix": "the suffix of the file to be written names no supported format",
    "download-failed": "a file cannot be downloaded",
    "checksum-mismatch": "a downloaded file has another size or checksum than the recipe states",
}
RUNS = {
    "version-mismatch": "the checkpoint has a layout of another version",
    "weights-mismatch": "the weights have other names or shapes than those of the model",
    "missing-weights": "the file holds no weights of the kind that is needed",
    "missing-config": "the file does not state how its weights are evaluated",
    "run-exists": "the output folder holds a run, or a later checkpoint",
    "output-in-use": "another process is writing to the same output",
    "settings-differ": "existing output was made with other settings",
    "class-mismatch": "the classes of model, weights and data do not fit together",
    "unreadable-data": "samples cannot be read",
    "empty-data": "no samples are there, or none are left",
    "too-few-samples": "fewer samples than are needed",
    "misaligned-data": "files that must correspond line by line or item by item do not",
    "loss-not-finite": "the loss is infinite or not a number",
    "invalid-environment": "an environment variable of a launcher such as torchrun is missing or cannot be used",
    "process-lost": "another process of the run ended",
    "process-failed": "an external program failed",
}

CODES: dict[str, str] = VALUES | COMPONENTS | MEMORY | FILES | RUNS
"""What each code means. docs/reference/errors.md lists them with what to do."""
