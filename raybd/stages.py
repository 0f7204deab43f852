"""The stages of a study, in order: poison, pretrain, search, fronts, report. What is done is not done twice."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import IntEnum

from raybd import provenance, run_record, tables
from raybd.console import View
from raybd.errors import StudyError, TrialError
from raybd.failures import message_of, traceback_name
from raybd.metrics import ALIKE, STRONG
from raybd.records import attack_lines, attack_rows, pretrain_rows, weak_attack
from raybd.store import Store
from raybd.study import Study
from raybd.study_directory import Outcome, StudyDirectory


class Stage(IntEnum):
    """How far a call goes."""

    PRETRAIN = 1
    SEARCH = 2


class Run(StudyDirectory):
    """A study in its run directory.

    Args:
        address: of a Ray cluster; None uses this machine.
        allow_code_change: go on with what another version of raybd made.

    Errors: StudyError where the directory holds another study, or results of other code.
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        view: View,
        *,
        address: str | None = None,
        allow_code_change: bool = False,
    ) -> None:
        # These import torch, which a report does without.
        from raybd.train.inputs import inputs_for

        super().__init__(study, store, view, address=address)
        self.inputs = inputs_for(study)
        if self.earlier and not allow_code_change:
            self._check_code(self.earlier["environment"]["raybd"])

    def _check_code(self, code: str) -> None:
        if code != provenance.code_version():
            raise StudyError(
                f"made by raybd {code}, this is {provenance.code_version()}: their numbers may differ",
                where=self.store.uri,
                fix="give another --run-dir, use that version, or pass --allow-code-change",
            )

    def _record(self) -> dict[str, str]:
        """Write study, versions and the ids of the pretraining runs into the run directory; return the ids.

        A run directory has one id for each pretrain objective, for good. Errors: StudyError where the data changed.
        """
        environment = provenance.environment()
        if self.earlier:
            environment["raybd"] = self.earlier["environment"]["raybd"]
        ids = {
            objective: self.inputs.pretrain_id(objective, code=environment["raybd"])
            for objective in self.study.pretrain.objectives
        }
        if self.earlier and self.earlier["pretrain_ids"] != ids:
            raise StudyError(
                "the data, or the checkpoint to start from, are not those that this run directory was made with",
                where=self.store.uri,
                fix="give another --run-dir, or put them back",
            )
        record = {
            "study": self.study.resolved(),
            "hash": self.study.hash(),
            "pretrain_ids": ids,
            "environment": environment,
            "created": self.earlier["created"] if self.earlier else datetime.now(UTC).isoformat(),
        }
        if self.earlier and "gpu_share" in self.earlier:
            record["gpu_share"] = self.earlier["gpu_share"]
        self.store.put("study.json", json.dumps(record, indent=1).encode())
        return ids

    def run(self, until: Stage = Stage.SEARCH) -> Outcome:
        """Carry the study out, as far as `until`. Errors: RaybdError, before any long work where it can be."""
        self.view.stage(f"study {self.study.name}: checking data, model and settings")
        ids = self.poison()
        with self.tracking:
            self.load_tables()
            if self._open_work(ids, until):
                with self.cluster():
                    pretrained = self.pretrain(ids)
                    if until >= Stage.SEARCH:
                        self.search(pretrained)
            else:
                self.view.stage("nothing left to do: pretraining and search are done")
                self._attack_summary(ids)
            return self.finish()

    def _open_work(self, ids: dict[str, str], until: Stage) -> bool:
        from raybd.train.pretraining import done

        if any(done(self.store, pretrain_id) is None for pretrain_id in ids.values()):
            return True
        if until < Stage.SEARCH:
            return False
        total, ended = self.trials(ids)
        return total > ended

    def poison(self) -> dict[str, str]:
        """Check all inputs; write the plan, its preview and what was skipped; return the ids of the pretrainings."""
        import torch

        from raybd.clean import registry
        from raybd.poison.preview import preview

        self.inputs.check()
        registry.check(self.study)
        ids, plan = self._record(), self.inputs.plan
        if not (self.earlier and self.store.exists("tables/poison_plan/plan.parquet")):
            images = self.inputs.train_images(plan.examples(3))
            pictures = [torch.from_numpy(pixels) for pixels in images.values()]
            self.store.put("preview.png", preview(pictures, list(images), plan))
            self.store.put("skipped.json", json.dumps(self.inputs.skipped, indent=1).encode())
            tables.write(self.store, "poison_plan", "plan", plan.table())
        total = len(self.inputs.train_index)
        for attack, count in zip(plan.attacks, plan.counts(), strict=True):
            captions = "with captions that name" if attack.trigger.name == "label_consistent" else "captioned as"
            self.view.stage(
                f"poison: {count} of {total} training pairs ({count / total:.3%}) carry {attack.trigger.name}, "
                f"{captions} {attack.target_class!r}"
            )
        return ids

    def pretrain(self, ids: dict[str, str]) -> dict[str, str]:
        """Pretrain each objective that is not done; return the ids of those that are, by objective.

        Errors: TrialError where none is.
        """
        from raybd.cluster.pretrain import run_pretraining
        from raybd.train.pretraining import done

        missing = {name: pretrain_id for name, pretrain_id in ids.items() if done(self.store, pretrain_id) is None}
        if missing:
            workers = f"{self.share.num_workers} worker{'s' if self.share.num_workers > 1 else ''}"
            self.view.stage(f"pretraining {' and '.join(missing)}: {workers}")
            with self.view.follow_pretraining(self.store, missing, self.tracking.pretrained):
                self.failed_pretraining = run_pretraining(self.study, missing, self.store, self.share)
        for objective, reason in self.failed_pretraining.items():
            self.view.warn(f"pretraining {objective} failed: {reason}")
        entries = {name: entry for name, pretrain_id in ids.items() if (entry := done(self.store, pretrain_id))}
        if not entries:
            objective, reason = next(iter(self.failed_pretraining.items()))
            raise TrialError(
                f"nothing to clean: {reason}",
                where=f"pretraining {objective}",
                fix=f"see {self.store.path(traceback_name(ids[objective]))}; to try again call the same command",
            )
        for entry in entries.values():
            self.write_pretraining(entry)
            self.tracking.pretrained(entry.id)
        self._attack_summary(ids)
        return {name: ids[name] for name in entries}

    def _attack_summary(self, ids: dict[str, str]) -> None:
        """Say how well the attack took; warn where the cleanings of the objectives will compare little."""
        from raybd.train.pretraining import done

        self.view.stage("poisoned models")
        lasts = {}
        for objective, pretrain_id in ids.items():
            entry = done(self.store, pretrain_id)
            if entry is None:
                continue
            last = lasts[objective] = pretrain_rows(entry)[-1]
            self.view.line(
                f"  {objective}: accuracy {last['zeroshot_top1']:.2%} ({last['correct_clean']} of {last['n_clean']}), "
                f"ASR {last['asr_top1']:.2%} ({last['hit_target']} of {last['n_triggered']}), "
                f"{last['poisoned_seen']} poisoned pairs seen in {last['epoch']} epochs"
            )
            for line in attack_lines(attack_rows(entry), epoch=last["epoch"]):
                self.view.line(f"    {line}")
        if not lasts:
            return
        asr = {objective: last["asr_top1"] for objective, last in lasts.items()}
        low, high = min(asr, key=asr.__getitem__), max(asr, key=asr.__getitem__)
        if asr[high] - asr[low] > ALIKE:
            self.view.warn(
                f"{high} and {low} differ by {100 * (asr[high] - asr[low]):.1f} points of ASR: "
                "their cleanings compare little"
            )
        for objective, value in asr.items():
            if value < STRONG:
                self.view.warn(weak_attack(objective, value, trained=lasts[objective]["epoch"] > 0))

    def _illustrate(self) -> None:
        try:
            self._ask_models()
        except Exception as error:  # full memory, weights that are damaged or not finite: the report does without
            self.view.warn(f"what the models say of some test images is not known: {message_of(error)}")

    def _ask_models(self) -> None:
        """Write what the models say of some test images, where that is not there yet."""
        from raybd import predictions
        from raybd.evaluations import device_here

        rows = tables.read(self.store, "fronts").to_pylist()
        points = predictions.shown_points(self.store, run_record.read(self.store)["pretrain_ids"], rows)
        if points and not predictions.are_there(self.store, points):
            self.view.stage("looking at what the models say of some test images")
            predictions.update(self.store, self.inputs, points, device=device_here())

    def search(self, ids: dict[str, str]) -> None:
        """Run the trials that have not ended."""
        from raybd.clean.actor import CleanTrial

        if self.share.use_gpu and self.study.resources.gpus_per_trial == "auto":
            self._share_gpus(ids)
        share = self.share
        self.run_trials(ids, CleanTrial(share.cpus_per_trial, use_gpu=share.use_gpu, memory=share.memory_per_trial))

    def _share_gpus(self, ids: dict[str, str]) -> None:
        """Measure how many trials share a GPU, anew in each call: its machines may be others. Say and record it."""
        from raybd.cluster import gpus

        total, ended = self.trials(ids)
        if total == ended:
            return
        prompts = len(self.inputs.evaluation_set.prompts)
        with self.view.live("measuring what a trial takes of a GPU"):
            self.share, choice = gpus.settle(self.study, self.share, prompts=prompts, trials=total - ended)
        self.view.stage(f"GPUs: {choice}")
        run_record.update(self.store, gpu_share=choice.record())
