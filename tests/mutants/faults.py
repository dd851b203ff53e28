"""Faults to plant, each a line changed, which the tests named beside it must notice.

Each is something that a person could write and that a reader could miss. `run.py` plants them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One line changed.

    files: a path, or a pattern of paths; `old` is found exactly once in all of them together.
    old, new: a part of one line, and what takes its place.
    why: what would go wrong. tests: arguments for pytest, a file and perhaps -k.
    """

    files: str
    old: str
    new: str
    why: str
    tests: str


TRAINER = "tests/training/test_training_against_trainer.py -k"
PEFT, ADAPTERS = "tests/formats/test_peft.py", "tests/adapters/test_adapters.py"
TEMPLATES, INSPECT = "tests/data/test_templates.py", "tests/inspect/test_inspect.py"
ONCE = "tests/robustness/test_once_unnoticed.py"
ROWS = "tests/inference/test_rows_together.py"
NAMED = "tests/inference/test_named_adapters.py"
MIXED = "tests/inference/test_mixed_batches.py"
GENERATE_MIXED = "tests/inference/test_generate_mixed.py"
LOOP = "lorax/training/*.py"
SCHEDULE = "lorax/training/schedule.py"
BATCHES = "lorax/data/batches.py"
EXAMPLES = "lorax/data/examples.py"
GENERATE = "lorax/inference/*.py"
CONFIG = "lorax/adapters/config.py"
MERGE = "lorax/adapters/*.py"
ROUTES = "lorax/merging/routes.py"
COSTS = "lorax/merging/costs.py"
LLAMA = "lorax/models/*.py"
GPT2 = "lorax/models/*.py"
FORMATS = "lorax/formats/*.py"
CHECKPOINT, SNAPSHOT = "lorax/training/checkpoint.py", "lorax/training/snapshot.py"
RESUME, PROTOCOL = "tests/faults/test_resume.py", "tests/faults/test_checkpoint_protocol.py"
SIGNALS = "tests/faults/test_signals.py"
LABORATORY = "tests/merging/test_merge_laboratory.py"
MODELS = "tests/models/test_models.py"
PACKED = "tests/models/test_packed.py"
PROCESSES = "lorax/training/processes.py"
SEVERAL = "tests/training/test_several_processes.py"

TRAINING_FAULTS = [
    Fault(LOOP, "step - 1, ", "step, ",
          "the learning rate is a step off", f"{TRAINER} cosine"),
    Fault(LOOP, "hook.after_step()\n            self.optimizer.zero_grad()", "hook.after_step()",
          "gradients of all steps add up", f"{TRAINER} cosine"),
    Fault(LOOP, "self.optimizer.zero_grad()\n            self._not_finite(line)",
          "self._not_finite(line)", "the NaN of a skipped step stays in the gradients",
          f"{RESUME}::test_skip_leaves_the_weights_bit_equal"),
    Fault(LOOP, 'if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):',
          'if math.isfinite(line["loss"]):',
          "a NaN in the gradient alone is stepped with", f"{ONCE} -k gradient"),
    Fault(LOOP, "max_norm or math.inf", "max_norm",
          "max_grad_norm = 0 zeroes the gradients", f"{TRAINER} no"),
    Fault(LOOP, "summed_loss(self.model, *batch) / tokens",
          "summed_loss(self.model, *batch) / (batch.labels != -100).sum()",
          "a mean of means", f"{TRAINER} cosine"),
    Fault(LOOP, "= base * factor", "= base",
          "the schedule is not applied", f"{TRAINER} linear"),
    Fault(LOOP, "max_norm or math.inf", "math.inf", "nothing is clipped", f"{TRAINER} clipping"),
    Fault(LOOP, "model.train()", "model.eval()", "no dropout in training",
          f"{ONCE} -k dropout"),
    Fault(SCHEDULE, "math.ceil(recipe.train.epochs * math.ceil(rows / recipe.train.batch_size))",
          "math.ceil(recipe.train.epochs) * math.ceil(rows / recipe.train.batch_size)",
          "fractional epochs are rounded up", f"{TRAINER} part"),
    Fault(SCHEDULE, "return (step + 1) / (warmup + 1)", "return step / warmup",
          "the first step does nothing", f"{TRAINER} warm"),
    Fault(SCHEDULE, "return math.ceil(total * ratio)", "return int(total * ratio)",
          "a warm-up that is a step short", f"{TRAINER} warm"),
    Fault(SCHEDULE, "progress = (step - warmup) / max(1, total - warmup)",
          "progress = step / total", "the cosine begins in the warm-up", f"{TRAINER} warm"),
    Fault(SCHEDULE, "return max(0.0, (total - step) / max(1, total - warmup))",
          "return max(0.0, (total - step) / total)", "the line's slope is another",
          f"{TRAINER} linear"),
    Fault("lorax/training/optimizers.py", "betas=(settings.adam_beta1, settings.adam_beta2)",
          "betas=(settings.adam_beta1, 0.999)", "adam_beta2 is not read", f"{TRAINER} betas"),
    Fault("lorax/training/optimizers.py", "eps=settings.adam_epsilon", "eps=1e-8",
          "adam_epsilon is not read", f"{TRAINER} cosine"),
    Fault("lorax/training/optimizers.py", "group[\"lr\"] = base * factor",
          "group[\"lr\"] *= factor", "rates multiply from step to step", f"{TRAINER} linear"),
    Fault("lorax/training/loss.py", "labels[:, 1:] != -100", "labels[:, 1:] != -1",
          "masked tokens are trained", f"{TRAINER} cosine"),
    Fault("lorax/training/loss.py", "labels[:, 1:][places]", "labels[:, :-1][places]",
          "each token predicts itself", f"{TRAINER} cosine"),
    Fault("lorax/training/loss.py", "gradient * gradients[0], None, None",
          "gradient, None, None", "the loss's factor is lost", f"{TRAINER} cosine"),
    Fault("lorax/training/evaluate.py", "model.train(was_training)", "pass",
          "an evaluation ends the dropout", "tests/training/test_training.py -k disturb"),
    Fault("lorax/training/evaluate.py", "model.eval()", "pass",
          "evaluations with dropout", f"{ONCE} -k dropout"),
    Fault(BATCHES, "random.Random(f\"{seed} {epoch}\")", "random.Random(f\"{seed}\")",
          "each epoch in one order", f"{ONCE} -k order"),
    Fault(BATCHES, "if not shuffle:", "if shuffle:", "shuffles where it should not",
          f"{ONCE} -k order"),
    Fault(BATCHES, "labels = torch.full((len(rows), width), IGNORED",
          "labels = torch.full((len(rows), width), pad_id", "padding is trained",
          f"{TRAINER} cosine"),
]  # fmt: skip

SHARED_FAULTS = [
    Fault(BATCHES, "labels += [IGNORED, *(token", "labels += [row.ids[0], *(token",
          "the label at a seam is trained", f"{PACKED} tests/training/test_packing.py"),
    Fault("lorax/models/packed.py",
          "torch.arange(length, device=x.device) for length in self.lengths",
          "torch.arange(sum(self.lengths), device=x.device) for _ in (0,)",
          "packed positions do not begin anew", f"{PACKED} -k gpt2"),
    Fault("lorax/models/packed.py",
          "torch.cat([causal_attention(*part, **how) for part in parts], dim=2)",
          "causal_attention(query, key, value, **how)", "packed documents see each other", PACKED),
    Fault(PROCESSES, "batches[self.rank :: self.size]", "batches[::]",
          "each process computes every row", f"{SEVERAL} -k every_row"),
    Fault(PROCESSES, "if len(mine) < -(-len(batches) // self.size):", "if False:",
          "a process with nothing to do is not waited for", f"{SEVERAL} -k every_row"),
    Fault(PROCESSES, "(loss * self._size).backward()", "loss.backward()",
          "gradients are averaged over processes", f"{SEVERAL} -k packed"),
    Fault("lorax/training/callbacks.py", "torch.random.fork_rng(devices=list(cuda)), torch",
          "torch", "a callback moves the random numbers", "tests/training/test_callbacks.py"),
    Fault("lorax/training/loggers.py", "old.unlink()", "pass", "a resumed run logs steps twice",
          "tests/training/test_loggers.py"),
]  # fmt: skip

CHECKPOINT_FAULTS = [
    Fault(SNAPSHOT, '_set_generators(read_file(path / "random.safetensors"))', "pass",
          "dropout draws anew after a resume", f"{RESUME}::test_cut_three_times"),
    Fault(SNAPSHOT, "live.hook.load_state(state", "id(state", "AdaLoRA's averages begin anew",
          f"{RESUME} -k every_method_goes_on_bit_for_bit[adalora]"),
    Fault(SNAPSHOT, 'if state["rows"] != rows_digest:', "if False:",
          "a run goes on over other rows", f"{RESUME}::test_other_rows_are_refused"),
    Fault(LOOP, "islice(batches, progress.step,", "islice(batches, 0,",
          "a resumed run sees the first rows again", f"{RESUME}::test_cut_three_times"),
    Fault(LOOP, "torch.set_rng_state(generators)", "pass",
          "a rollback draws the same dropout once more", f"{RESUME} -k rollback"),
    Fault(LOOP, "self.live.progress = now", "pass", "a rollback counts steps again",
          f"{RESUME} -k rollback"),
    Fault(LOOP, "if self.live.best:", "if False:", "early stopping keeps the last, not the best",
          f"{RESUME}::test_early_stopping_keeps_the_best"),
    Fault("lorax/training/metrics.py", "self._file.truncate(length)", "pass",
          "metrics.jsonl is not cut back", f"{RESUME} -k cut_back"),
    Fault("lorax/training/metrics.py", "self._file.read(length)", "self._file.read()",
          "lines that were cut off stay in the run's metrics", f"{RESUME} -k cut_back"),
    Fault(CHECKPOINT, "complete[: -max(1, keep)]", "complete[max(1, keep) :]",
          "rotation removes the newest", f"{RESUME} -k rotation"),
    Fault(CHECKPOINT, "if _is_complete(path)]", "if path]",
          "rotation counts damaged checkpoints", f"{PROTOCOL} -k rotation"),
    Fault(CHECKPOINT, ' or _digest(file) != entry["sha256"]:', ":",
          "changed bytes in a checkpoint are not found", f"{PROTOCOL} -k one_changed_bit"),
    Fault(CHECKPOINT, "if stated != _check_value(manifest):", "if False:",
          "a changed manifest is not found", f"{PROTOCOL} -k one_changed_bit"),
    Fault(CHECKPOINT, 'if there != set(files):', "if False:", "a file too many is not found",
          f"{PROTOCOL} -k too_few"),
    Fault("lorax/formats/disk.py", "disk.sync(temporary / name)", "pass",
          "a checkpoint is named before its content is on the disk",
          f"{PROTOCOL} -k every_crash_point"),
    Fault("lorax/training/signals.py", "self.stop = number", "pass", "a signal is not obeyed",
          SIGNALS),
    Fault("lorax/training/signals.py", "if self.stop is not None and self._at_once:", "if False:",
          "a second signal does not end the run at once", SIGNALS),
    Fault("lorax/training/signals.py", "signal.signal(number, handler)", "pass",
          "Ctrl-C stays swallowed after a run", SIGNALS),
    Fault(LOOP, "signals.save = False", "pass", "a checkpoint at each step after SIGUSR1",
          SIGNALS),
    Fault("lorax/training/run_directory.py", "fcntl.LOCK_EX | fcntl.LOCK_NB",
          "fcntl.LOCK_SH | fcntl.LOCK_NB", "two runs write into one directory", SIGNALS),
]  # fmt: skip

INFERENCE_FAULTS = [
    Fault(GENERATE, "probabilities[1:][before[1:] >= top_p] = 0.0",
          "probabilities[1:][(before + probabilities)[1:] > top_p] = 0.0",
          "the token that crosses top_p is dropped", f"{ONCE} -k top_p"),
    Fault(GENERATE, "min(max_new_tokens, room)", "max_new_tokens",
          "generation runs past the model's positions", f"{ONCE} -k room"),
    Fault(GENERATE, "(logits - logits.max()) / max(temperature, least)",
          "(logits - logits.max()) * max(temperature, least)",
          "temperature works the wrong way round", f"{ONCE} -k temperature"),
    Fault(GENERATE, "stream_rows(model, tokenizer.end_token_ids, [ids]",
          "stream_rows(model, [tokenizer.eos_token_id], [ids]", "only one end token ends",
          f"{ONCE} -k end"),
    Fault("lorax/inference/rows.py", "self.cache.lengths[slot] += 1",
          "self.cache.lengths[slot] += 2",
          "a row of a batch leaves places out", f"{ROWS} -k alone"),
    Fault("lorax/inference/native.c", "float y = sums[i + m * TILE];",
          "float y = sums[i];",
          "every row of a batch gets the first one's product", f"{ROWS} -k alone"),
    Fault("lorax/inference/native.c", "own->scaling * path[i + m * TILE]",
          "each[0]->scaling * path[i + m * TILE]",
          "every row of a batch has the first one's adapter's scale", f"{GENERATE_MIXED} -k bits"),
    Fault(GENERATE, "may_go.sort(key=lambda one: one.used)", "pass",
          "the adapters that came first leave memory, not those used longest ago",
          f"{NAMED} -k recently"),
    Fault(GENERATE, "known <= owner[\"adapted\"] and ", "",
          "a variant that computes otherwise is taken for a low-rank path", f"{MIXED} -k outside"),
    Fault(GENERATE, "if _stamps(one.directory) != one.stamps:", "if False:",
          "an adapter comes back from disk as another one", f"{NAMED} -k checked_once"),
    Fault(GENERATE, "model.train(was_training)", "pass", "generating leaves eval mode",
          f"{ONCE} -k mode"),
    Fault("lorax/models/attention.py", ".tril(S - T)", ".tril()",
          "with a cache the mask is another", MODELS + " -k cache"),
    Fault("lorax/models/cache.py", "self.length += x.shape[1]", "self.length = x.shape[1]",
          "the cache forgets its length", MODELS + " -k cache"),
]  # fmt: skip

MODEL_FAULTS = [
    Fault(LLAMA, "torch.cat([-second, first], dim=-1)", "torch.cat([second, -first], dim=-1)",
          "rotations the other way", MODELS + " -k llama"),
    Fault(LLAMA, "return self.weight * x32.to(x.dtype)", "return (self.weight * x32).to(x.dtype)",
          "the norm is rounded at another place in 16 bits", f"{ONCE} -k norm"),
    Fault(LLAMA, "/ theta**exponents / self.factor",
          "/ theta**exponents", "linear rope scaling is ignored",
          MODELS + " -k rope"),
    Fault(LLAMA, "(self.gate_proj(x)) * self.up_proj(x)",
          "(self.up_proj(x)) * self.gate_proj(x)", "gate and up are swapped",
          MODELS + " -k llama"),
    Fault(LLAMA, "keep * plain + (1 - keep) * plain / self.factor",
          "(1 - keep) * plain + keep * plain / self.factor",
          "llama3's rope the other way", MODELS + " -k rope"),
    Fault(GPT2, 'approximate="tanh"', 'approximate="none"', "the exact gelu, not GPT-2's",
          MODELS + " -k gpt2"),
    Fault(GPT2, "eps=config.layer_norm_epsilon)\n        self.attn",
          "eps=1e-3)\n        self.attn", "a norm's epsilon is another", MODELS + " -k gpt2"),
    Fault(FORMATS, 'found.get("dtype") or found.get("torch_dtype")',
          'found.get("torch_dtype")', "transformers 5's word for the dtype is not read",
          "tests/formats/test_config_dialects.py::test_auto_is_what_the_config_says_else_the_file"),
]  # fmt: skip

ADAPTER_FAULTS = [
    Fault("lorax/adapters/layer.py", "if self.merged is not None:",
          "if self.merged is not None and not self.training:",
          "merged weights are ignored in train mode", f"{ONCE} -k merged"),
    Fault("lorax/adapters/layer.py", "if not self.enabled:", "if False:",
          "disabled_adapter disables nothing",
          "tests/adapters/test_adapters.py -k disabled_adapter_gives"),
    Fault(CONFIG, "alpha / math.sqrt(rank) if self.use_rslora", "alpha / rank if self.use_rslora",
          "rsLoRA's scale is plain LoRA's", f"{PEFT} -k of_peft_loads"),
    Fault("lorax/adapters/config_checks.py", "not 1 <= rank <= highest", "not rank <= highest",
          "rank 0 is taken",
          f"{ADAPTERS} -k impossible_values"),
    Fault(CONFIG, 'name == pattern or name.endswith("." + pattern)', "name.endswith(pattern)",
          "a name matches half a word", f"{ONCE} -k word"),
    Fault("lorax/adapters/matching.py", r'_groups(rf"(.*\.)?({expression})$", name,',
          r'_groups(rf".*{expression}$", name,', "a pattern matches half a word",
          f"{ONCE} -k pattern"),
    Fault(CONFIG, "if self.exclude_modules and _matches(self.exclude_modules, name):",
          "if False:", "exclude_modules is ignored",
          f"{ADAPTERS} -k refused_config"),
    Fault("lorax/adapters/merge.py", "if any(layer.merged is not None for",
          "if any(False for",
          "merging twice is not refused",
          "tests/adapters/test_adapters.py -k state_does_not_allow"),
    Fault(MERGE, "if not merge:", "if merge:", "unload merges, and the other way round",
          "tests/adapters/test_adapters.py -k merging_on_nf4"),
    Fault(MERGE, "if rounded_to == torch.float32 else torch.float32",
          "if rounded_to == torch.float64 else torch.float32",
          "a rounding to float32 is measured in float32, as nothing", f"{ONCE} -k rounding"),
    Fault(ROUTES, 'return self.format is not None and is_linear and name != "lm_head"',
          "return self.format is not None and is_linear", "the head is quantized", LABORATORY),
    Fault(ROUTES, "model.to(route.dtype)", "pass", "norms keep another dtype", LABORATORY),
    Fault(ROUTES, "return RoutedLayer(module, LayerCost(rest, effect, captured), (A, B))",
          "return RoutedLayer(module, LayerCost(lost, effect, captured), (A, B))",
          "the residual counts for nothing", LABORATORY),
    Fault(COSTS, "(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_q - log_p))",
          "KL the other way round", LABORATORY + " -k kl"),
    Fault(COSTS, "kl_worst=kl.max().item()", "kl_worst=kl.mean().item()", "the largest is the mean",
          LABORATORY),
    Fault("lorax/merging/residual.py", "B[:, :kept] = U[:, :kept] * root",
          "B[:, :kept] = U[:, :kept]", "half of the residual's size is missing", LABORATORY),
    Fault("lorax/merging/laboratory.py", "best = min(costs", "best = max(costs",
          "the worst route is taken", LABORATORY),
    Fault("lorax/adapters/dora.py", "torch.addcmul(u, scaled, more)",
          "torch.addcmul(u, u, more)", "DoRA scales the bias too",
          "tests/adapters/test_dora.py -k of_peft_and_back"),
    Fault("lorax/adapters/dora.py", "2 * scaling * mixed + scaling**2 * own",
          "2 * scaling * mixed + scaling * own", "DoRA's norm is wrong for scales but 1",
          "tests/adapters/test_dora.py -k of_peft_and_back"),
    Fault("lorax/optim/lora_plus.py", "(fast, learning_rate * ratio)", "(fast, learning_rate)",
          "LoRA+ is AdamW", "tests/optim/test_optim_lora_plus.py -k b_and_vectors"),
]  # fmt: skip

QUANT_FAULTS = [
    Fault("lorax/quant/*.py", "scales.add_(nested.offset)", "scales",
          "the nested scales' offset is lost",
          "tests/quant/test_quant_four_bit.py -k r2_with_double"),
    Fault("lorax/quant/*.py", "MAX_RMS_GROWTH = 1.05", "MAX_RMS_GROWTH = 1e9",
          "double quantization where it is not safe",
          "tests/quant/test_quant_four_bit.py -k r7_whatever"),
    Fault("lorax/quant/*.py", "(pairs << 4).bitwise_or_(pairs >> 8)",
          "(pairs & 15).bitwise_or_((pairs >> 8) << 4)", "nibbles are swapped",
          "tests/quant/test_golden_bitsandbytes.py"),
    Fault("lorax/quant/*.py", "half.abs() >= threshold", "half.abs() > 1e9",
          "no outlier is kept in 16 bits", "tests/quant/test_quant_int8.py -k activations_against"),
    Fault("lorax/quant/*.py", "codes.index_fill_(1, columns, 0)", "codes",
          "outliers' columns count twice", "tests/quant/test_quant_int8.py -k activations_against"),
    Fault("lorax/quant/*.py", "(nibbles[0::2] << 4) | nibbles[1::2]",
          "(nibbles[1::2] << 4) | nibbles[0::2]", "nibbles are swapped",
          f"{ONCE} -k nibbles"),
    Fault("lorax/quant/*.py", "smallest = -largest if symmetric else -largest - 1",
          "smallest = -largest", "an affine code less", f"{ONCE} -k affine"),
    Fault("lorax/optim/adamw.py", "step_size = hyper.lr / (1 - hyper.beta1**hyper.step)",
          "step_size = hyper.lr", "no bias correction", "tests/optim/test_optim_adamw.py"),
    Fault("lorax/optim/adamw.py", "if hyper.maximize:", "if False:", "maximize minimizes",
          "tests/optim/test_optim_adamw.py"),
    Fault("lorax/optim/adamw8bit.py", 'if parameter.numel() < group["min_8bit_size"]',
          'if parameter.numel() > group["min_8bit_size"]', "small tensors in 8 bits, large in 32",
          "tests/optim/test_optim_8bit.py"),
]  # fmt: skip

FILE_FAULTS = [
    Fault(FORMATS, "if name in self.home:", "if False:",
          "one tensor in two shards is taken", f"{ONCE} -k shards"),
    Fault(FORMATS,
          "if self._pending and pending + size > self._max_shard_bytes:",
          "if False:", "there is never a second shard", f"{MODELS} -k shard"),
    Fault(FORMATS, "os.rename(temporary, target)",
          "shutil.copytree(temporary, target, dirs_exist_ok=True)",
          "a rename that is no rename: half a directory after a crash", f"{ONCE} -k rename"),
    Fault(FORMATS, 'if target.is_dir() and any(path.name != "lost+found" for path in',
          "if target.is_dir() and any(False for path in", "somebody's directory is written into",
          "tests/training/test_training.py -k refused_before"),
    Fault("lorax/formats/huggingface.py", "files = open_model_files(path, revision)",
          "files = open_model_files(path)", "the Hub's revision is dropped",
          f"{ONCE} -k revision"),
    Fault("lorax/training/finished.py", "load_tokenizer(settings.path, revision=settings.revision)",
          "load_tokenizer(settings.path)", "the tokenizer is another revision's",
          f"{ONCE} -k revision"),
    Fault(FORMATS, "and quantizable(module_name, module):", "and True:",
          "what must stay dense is quantized", "tests/quant/test_loading_memory.py " + MODELS),
    Fault(FORMATS, "if torch.equal(source.read(head), source.read(names[model.embedding_name])):",
          "if True:", "a head that differs is dropped without a word",
          "tests/formats/test_config_dialects.py::"
          "test_a_head_in_the_file_of_a_tied_model_against_transformers"),
    Fault(FORMATS, 'in ("generation_config.json", "config.json"):',
          'in ("generation_config.json",):', "config.json's eos_token_id is not read",
          f"{ONCE} -k config_json"),
    Fault(FORMATS, "parameter.requires_grad_(wanted)", "pass",
          "a failed load leaves the model frozen", f"{ONCE} -k failed_load"),
    Fault(FORMATS,
          'raise AdapterError(f"{where}: {name} is not finite; get the file anew, or train again")',
          "pass",
          "NaN in an adapter is loaded", f"{PEFT} -k do_not_fit"),
    Fault(FORMATS, "if missing or unexpected:", "if missing:",
          "a tensor without a place is ignored", "tests/formats/test_peft.py"),
    Fault(FORMATS, 'if digest is not None and digest != stated["sha256"]:',
          "if False:", "an adapter of another base is loaded", "tests/formats/test_fingerprint.py"),
    Fault(FORMATS, "if len(below) > 1:", "if False:",
          "one of several adapters is taken", f"{PEFT} tests/formats/test_peft_extras.py"),
    Fault("lorax/data/templates.py", "if not selector.select(MAX_SECONDS):",
          "if not selector.select():", "a template may run for ever", TEMPLATES),
    Fault("lorax/data/template_worker.py", "ImmutableSandboxedEnvironment(", "Environment(",
          "a template is no longer in the sandbox", TEMPLATES),
    Fault("lorax/data/template_worker.py", "if size > MAX_OUTPUT_CHARACTERS:", "if False:",
          "a template may write without end", TEMPLATES),
    Fault(EXAMPLES, "and part[-1:] != end:", "and True:", "a second end token is trained",
          "tests/data/test_examples.py"),
    Fault(EXAMPLES, "ids = tokenizer.prefix + ids", "ids = [*ids]", "no bos token in front",
          "tests/data/test_examples.py"),
    Fault("lorax/data/tokenizer.py", "and ids[:2] == [bos, bos]:", "and False:",
          "two bos tokens", f"{ONCE} -k bos"),
]  # fmt: skip

REPORT_FAULTS = [
    Fault("lorax/parity/report.py",
          "return bool(self.checks) and not self.refusals and all(c.holds for c in self.checks)",
          "return not self.refusals and all(c.holds for c in self.checks)",
          "nothing compared holds", f"{ONCE} -k report"),
    Fault("lorax/parity/report.py", "or 0 < self.bound >= self.difference.relative",
          "or self.bound >= 0", "every difference holds", f"{ONCE} -k report"),
    Fault("lorax/parity/difference.py", "if not gap.isfinite().all():", "if False:",
          "a NaN is no difference", f"{ONCE} -k difference"),
    Fault("lorax/parity/difference.py", "mine.dtype == theirs.dtype and torch.equal(",
          "torch.equal(", "values of another dtype are equal", f"{ONCE} -k difference"),
    Fault("lorax/inspect/quantization.py", "return 8 * self.nbytes / self.weights",
          "return self.nbytes / self.weights", "bytes are called bits", INSPECT),
    Fault("lorax/inspect/optimizer.py", "before = 0 if resumed else getattr(last, name)",
          "before = getattr(last, name)", "a resume counts negative",
          "tests/inspect/test_inspect_optimizer.py"),
    Fault("lorax/cli/verify.py", "if not report.holds:", "if False:", "verify always exits with 0",
          "tests/parity/test_verify.py -k json_has"),
]  # fmt: skip

FAULTS = [
    *TRAINING_FAULTS, *SHARED_FAULTS, *CHECKPOINT_FAULTS, *INFERENCE_FAULTS, *MODEL_FAULTS,
    *ADAPTER_FAULTS,
    *QUANT_FAULTS, *FILE_FAULTS, *REPORT_FAULTS,
]  # fmt: skip
