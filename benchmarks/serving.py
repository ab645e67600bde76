"""What the dial buys a server: real requests over HTTP, server and engine on core 0, the load generator on core 1.

    python benchmarks/serving.py                                  # VGG (CIFAR, 16 images a request) and ResNet-50 (one image)
    python benchmarks/serving.py --networks vgg --parts poisson   # one part of one network
    python benchmarks/serving.py --networks vit_s,minilm_l6_128 --parts engine,burst  # transformers (BITDIAL_CPU_ISA=avx2)

Parts, each a set of rows in serving.KIND.json (rows that are there already are kept; --fresh starts over):

  engine      the bare engine's time for one request at every ratio, interleaved, medians
  poisson     Poisson arrivals at rising rates: fixed 0, 25, 50, 75, 100 % and the controller; which rate each sustains
  trace       a real trace, sped up until it exceeds what the server carries at 8 bits in a fifth of its 5 s windows: controller,
              baselines, oracle
  burst       calm, burst, calm, as at the end of ./demo: 8 bits, then the dial; rates from what this machine carries
  simulation  the same trace in the simulation, with the service table that the server measured

A request that cannot be answered within the SLO is dropped or refused; percentiles over all requests count it as infinite.
"Sustained": the largest rate at which 99 % (90 %) of all requests were answered within the SLO.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact import load_program
from bitdial.loadtest import poisson, read_trace, window, write_result
from bitdial.serving.control import ServiceTable, Settings
from bitdial.simulation.comparison import run_policy
from bitdial.simulation.fleet import Fleet, Load, Noise
from bitdial.simulation.oracle import best_schedule
from bitdial.simulation.shaping import overload
from common import ROOT, data_folder, note, percent, print_table, run_command
from results import ResultFile
from serving_harness import LOAD_CORE, Setting, begin, engine_seconds, figures, pin, play, server, sustained, unpin

SETTINGS = {
    "vgg": Setting(images=16, slo=0.060),
    "resnet50": Setting(images=1, slo=0.120),
    "vit_s": Setting(images=1, slo=0.100),
    "minilm_l6_128": Setting(images=8, slo=0.250),
}
FIXED = ("fixed:0", "fixed:0.25", "fixed:0.5", "fixed:0.75", "fixed:1")
ADAPTIVE = "planned"
TRACE_POLICIES = (ADAPTIVE, "lookahead", "slackfit", "ladder", "fixed:0", "fixed:0.5", "fixed:1", "oracle")
LOADS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of what the bare engine carries at the policy's own top ratio
WARMUP = 8


class Bench:
    """One network: its model file, settings, and the rows measured."""

    def __init__(self, network: str, model: Path, options: argparse.Namespace, results: ResultFile) -> None:
        self.network, self.model, self.options, self.results = network, model, options, results
        self.setting = SETTINGS[network]
        self.isa = os.environ.get("BITDIAL_CPU_ISA", "")
        self.program = load_program(model)
        self.folder = options.cache
        self.table_file = self.folder / f"{network}.service-table.json"

    def row(self, name: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row of this network, from the file or measured now."""
        settings = {"slo_ms": 1e3 * self.setting.slo, "images": self.setting.images, **settings}
        row, fresh = self.results.measure(f"{self.network}/{name}", settings, measure)
        if fresh:
            note(f"{self.network}/{name}: done")
        return row

    def chosen(self, policies: Sequence[str]) -> list[str]:
        """Those that --policies leaves."""
        return [p for p in policies if not self.options.policies or p in self.options.policies.split(",")]

    # ---- parts ---------------------------------------------------------------------------------------------------------------

    def engine(self) -> list[float]:
        """Seconds of a request in the bare engine, per ratio."""

        def measure() -> dict[str, Any]:
            seconds = engine_seconds(self.model, self.setting.images)
            return {"ratios": self.program.ratios, "seconds": seconds, "speedup": seconds[0] / seconds[-1]}

        name, settings = (f"engine/{self.isa}", {"isa": self.isa}) if self.isa else ("engine", {})
        return list(self.row(name, settings, measure)["seconds"])

    def table(self) -> ServiceTable:
        """The service table as the server itself measures it at its start (batches through the worker)."""
        if not self.table_file.exists():
            with server(self.model, self.setting, "fixed:0", "--save-table", str(self.table_file)):
                pass
        return ServiceTable.from_json(self.table_file.read_bytes(), str(self.table_file))

    def run(
        self, policy: str, times: npt.NDArray[np.float64], seconds: float, about: str, keep: str = ""
    ) -> dict[str, Any]:
        """One server start, one load."""
        with server(self.model, self.setting, policy, "--table", str(self.table_file)) as target:
            result = play(target, self.setting, times, seconds, about, WARMUP)
        if keep:
            write_result(result, self.folder / f"{self.network}.{keep}.json")
        return figures(result)

    def poisson(self) -> None:
        """Rows of all fixed ratios and the controller at rising rates."""
        seconds = self.engine()
        self.table()
        for policy in self.chosen((*FIXED, ADAPTIVE)):
            top = len(seconds) - 1 if policy == ADAPTIVE else self.program.ratios.index(float(policy.split(":")[1]))
            for load in LOADS:
                rate = load / seconds[top]
                span = self.options.seconds
                settings = {"policy": policy, "load": load, "seconds": span, "seed": self.options.seed}
                self.row(
                    f"poisson/{policy}/{load:g}",
                    settings,
                    lambda rate=rate, policy=policy, span=span: {
                        "rate": rate,
                        **self.run(policy, poisson(rate, span, self.options.seed), span, f"Poisson, {rate:.1f}/s"),
                    },
                )

    def trace_times(self) -> tuple[npt.NDArray[np.float64], float, dict[str, Any]]:
        """A part of the trace, sped up until it overloads 8 bits in a fifth of the windows of 5 s."""
        capacity = 1.0 / (self.table().latency(0, self.setting.images) + self.overhead())
        times = read_trace(data_folder() / "traces" / f"azure_llm_2023_{self.options.trace}.csv")
        begin, span = self.options.trace_from * float(times[-1]), self.options.trace_part * float(times[-1])
        times = window(times, begin, begin + span)
        bent = overload(times, capacity, 0.2, 5.0)
        about: dict[str, Any] = {"trace": self.options.trace, "from": self.options.trace_from}
        about |= {"part": self.options.trace_part, "speed": round(bent.speed, 3)}
        about |= {"over_capacity_share": bent.share, "peak_over_capacity": bent.peak, "capacity": capacity}
        return bent.times, float(bent.times[-1]) + 1e-6, about

    def trace(self) -> None:
        """Rows of all policies on the same trace."""
        self.table()
        times, seconds, about = self.trace_times()
        for policy in self.chosen(TRACE_POLICIES):
            settings = {"policy": policy, "trace": about["trace"], "from": about["from"], "part": about["part"]}

            def measure(policy: str = policy) -> dict[str, Any]:
                with tempfile.TemporaryDirectory() as folder:
                    text = policy
                    if policy == "oracle":
                        text = self.oracle(times, Path(folder) / "oracle.json")
                    found = self.run(
                        text, times, seconds, f"{self.options.trace} trace", keep=f"trace.{policy.replace(':', '')}"
                    )
                return {**about, **found}

            self.row(f"trace/{policy}", settings, measure)

    def oracle(self, times: npt.NDArray[np.float64], file: Path) -> str:
        """Writes the schedule of one who knows the trace; returns the policy that follows it."""
        table, overhead = self.table(), self.overhead()
        index = range(len(table.ratios))
        schedule = best_schedule(
            times,
            [table.latency(i, self.setting.images) + overhead for i in index],
            [table.loss(i) for i in index],
            self.setting.slo - 0.002,
        )
        script = schedule.script(len(table.ratios) - 1)
        file.write_text(json.dumps({"first": 1 + WARMUP, "indices": [int(i) for i in script]}))
        return f"scripted:{file}"

    def overhead(self) -> float:
        """Seconds of the server's own work per request on the shared core: what a fixed ratio's measured capacity lacks. From the
        trace or Poisson rows at overload where there are any, else 0.6 ms."""
        rows = [
            r
            for n, r in self.results.rows.items()
            if n.startswith(f"{self.network}/poisson/fixed:1/") and r["settings"]["load"] >= 1
        ]
        if not rows:
            return 0.0006
        achieved = max(r["achieved_rate"] for r in rows)
        return max(0.0, 1.0 / achieved - self.table().latency(len(self.program.ratios) - 1, self.setting.images))

    def simulation(self) -> None:
        """The trace's policies under the virtual clock."""
        times, _, about = self.trace_times()
        table = self.table()
        fleet = Fleet(overhead=self.overhead(), shared_core=True)
        settings = Settings(slo=self.setting.slo, max_batch=self.setting.images)
        for policy in TRACE_POLICIES:
            if policy == "oracle":
                continue
            key = {"policy": policy, **{k: about[k] for k in ("trace", "from", "part")}, "overhead": fleet.overhead}
            self.row(
                f"simulation/{policy}",
                key,
                lambda policy=policy: run_policy(
                    policy, table, settings, Load(times, self.setting.images), fleet, Noise(), self.options.seed
                ).as_json(),
            )

    def burst(self) -> None:
        """One row: both policies of the demo's burst."""
        sys.path.insert(0, str(ROOT / "examples" / "demo"))
        from burst import run_burst

        calm, high = self.options.seconds / 2, self.options.seconds
        settings = {"seconds": [calm, high], "seed": self.options.seed, "isa": self.isa or "best"}

        def measure() -> dict[str, Any]:
            unpin()
            images, seed = self.setting.images, self.options.seed
            return run_burst(self.model, (calm, high), seed, lambda *_: None, samples=images, max_ratio=1.0).as_json()

        self.row(f"burst/{self.isa or 'best'}", settings, measure)

    # ---- tables --------------------------------------------------------------------------------------------------------------

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        """Rows of a part by the rest of their names."""
        prefix = f"{self.network}/{part}/"
        return {n.removeprefix(prefix): r for n, r in self.results.rows.items() if n.startswith(prefix)}

    def show(self) -> None:
        """Print what is there."""
        seconds = self.engine()
        print_table(
            f"{self.network}: bare engine, {self.setting.images} image(s) a request",
            ["ratio", "ms", "speedup"],
            [
                [f"{100 * r:g} %", f"{1e3 * s:.2f}", f"{seconds[0] / s:.2f}"]
                for r, s in zip(self.program.ratios, seconds, strict=True)
            ],
            "" if seconds[0] / seconds[-1] >= 1.2 else "Below 1.2x: the dial cannot help this network on this machine.",
        )
        self.show_poisson(seconds)
        self.show_burst()
        self.show_trace()

    def show_poisson(self, seconds: list[float]) -> None:
        """Sustained rates, and all points."""
        points = self.rows("poisson")
        if not points:
            return
        goals = (0.99, 0.9)
        found: dict[str, list[float | None]] = {}
        for policy in (*FIXED, ADAPTIVE):
            mine = [r for r in points.values() if r["settings"]["policy"] == policy]
            if mine:
                rates = [r["rate"] for r in mine]
                found[policy] = [sustained(rates, [r["attainment"] for r in mine], g) for g in goals]
        base = found.get("fixed:0", [None, None])
        print_table(
            f"{self.network}: Poisson, SLO {1e3 * self.setting.slo:g} ms; requests/s sustained (x of fixed 8-bit)",
            ["policy", "99 % in time", "90 % in time"],
            [
                [
                    p,
                    *(
                        ("-" if v is None else f"{v:.1f}" + (f" ({v / b:.2f}x)" if b else ""))
                        for v, b in zip(values, base, strict=True)
                    ),
                ]
                for p, values in found.items()
            ],
            f"the engine's own speedup: {seconds[0] / seconds[-1]:.2f}x",
        )
        print_table(
            f"{self.network}: Poisson, all points; latency of all requests, ms (-: not answered)",
            ["policy", "load", "requests/s", "in time", "p50", "p90", "p99", "mean ratio", "generator late p99"],
            [
                [
                    r["settings"]["policy"], f"{r['settings']['load']:g}", f"{r['rate']:.1f}", percent(r["attainment"]),
                    *(_ms(r[f"all_p{q}_ms"]) for q in (50, 90, 99)), f"{r['mean_ratio'] or 0:.2f}", _ms(r["lateness_ms"]["p99"]),
                ]
                for r in points.values()
            ],
        )  # fmt: skip

    def show_burst(self) -> None:
        """The demo's burst, without and with the dial."""
        for isa, r in self.rows("burst").items():
            print_table(
                f"{self.network} ({isa} instructions): calm {r['calm_rate']:.1f} requests/s, burst {r['burst_rate']:.1f}, "
                f"within {r['slo_ms']:.0f} ms",
                ["policy", "in time", "p50 ms", "p99 ms", "mean ratio", "turned away"],
                [
                    [
                        name, percent(run["attainment"]), _ms(run["latency_ms"]["p50"]), _ms(run["latency_ms"]["p99"]),
                        f"{run['mean_ratio'] or 0:.2f}", str(run["counts"]["shed"] + run["counts"]["expired"]),
                    ]
                    for name, run in r["runs"].items()
                ],
                "requests/s carried: {:.1f} at 8 bits, {:.1f} at the top ratio ({:.2f}x)".format(*r["carried_rates"], r["gain"]),
            )  # fmt: skip

    def show_trace(self) -> None:
        """Policies on the trace, real and simulated."""
        real, virtual = self.rows("trace"), self.rows("simulation")
        if not real:
            return
        first = next(iter(real.values()))
        lines = []
        for policy, r in real.items():
            v = virtual.get(policy)
            accuracy = r["expected_accuracy"]
            lines.append([
                policy, percent(r["attainment"]), _ms(r["latency_ms"]["p50"]), _ms(r["latency_ms"]["p90"]),
                _ms(r["latency_ms"]["p99"]), "-" if accuracy is None else f"{100 * accuracy:.2f}", f"{r['mean_ratio']:.2f}",
                f"{r['ratio_changes_per_minute'] or 0:.0f}", _ms(r["lateness_ms"]["p99"]),
                "-" if v is None else percent(v["attainment"]), "-" if v is None else _ms(v["p90_ms"]),
                "-" if v is None else f"{v['mean_ratio']:.2f}",
            ])  # fmt: skip
        print_table(
            f"{self.network}: {first['trace']} trace x {first['speed']:g}, above 8-bit capacity in "
            f"{100 * first['over_capacity_share']:.0f} % of 5 s windows, peak {first['peak_over_capacity']:.2f}x",
            [
                "policy",
                "in time",
                "p50 ms",
                "p90",
                "p99",
                "accuracy %",
                "mean ratio",
                "changes/min",
                "late p99",
                "sim: in time",
                "p90",
                "ratio",
            ],
            lines,
        )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def model_file(network: str, folder: Path, given: Path | None) -> Path:
    """The artifact: given, or made once (greedy selection; accuracy measured where the weights are trained)."""
    if given is not None:
        return given / f"{network}.bitdial"
    path = folder / f"{network}.bitdial"
    if not path.exists():
        from peers.networks import build_artifact

        note(f"{network}: quantizing (once)")
        folder.mkdir(parents=True, exist_ok=True)
        unpin()  # torch's threads on one core take minutes
        build_artifact(network, path, data_folder(), lambda stage, share: None)
        pin(LOAD_CORE)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/serving.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="vgg,resnet50")
    parser.add_argument("--parts", default="engine,poisson,trace,simulation")
    parser.add_argument("--policies", default="", help="only these, e.g. fixed:0,planned (default: all)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of every Poisson point")
    parser.add_argument("--trace", default="conv", choices=("conv", "code"))
    parser.add_argument("--trace-from", type=float, default=0.6, help="where in the trace to begin, as a share of it")
    parser.add_argument("--trace-part", type=float, default=0.2, help="share of the trace that is played")
    parser.add_argument("--seed", type=int, default=0)
    options, results = begin(parser, arguments, "serving")
    print(f"{results.machine['cpu']}; server and engine on core 0 (one thread), load generator on core 1")
    for network in options.networks.split(","):
        bench = Bench(network, model_file(network, options.cache, options.artifacts), options, results)
        for part in options.parts.split(","):
            getattr(bench, part)()
        bench.show()


if __name__ == "__main__":
    run_command(main)
