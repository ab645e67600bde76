"""The command line `bitdial`: parses, calls, prints.

Commands import what they need when they run, so that --help is quick and needs no torch.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from bitdial._version import __version__
from bitdial.cli import (
    benchmark,
    compare,
    compile,
    deploy,
    doctor,
    evaluate,
    export_c,
    export_npu,
    export_onnx,
    finetune,
    inspect,
    latency_table,
    loadtest,
    machine,
    quantize,
    report,
    serve,
    simulate,
)
from bitdial.cli.configs import LazyCommand, lazy
from bitdial.errors import BitdialError

__all__ = ["app", "main"]

EXIT_ERROR, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

# All errors of the parser, whichever library typer takes it from.
_ParserError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="bitdial",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


# Each command with examples of its use.
_COMMANDS: dict[Callable[..., Any], tuple[str, ...]] = {
    quantize.quantize: (
        "bitdial quantize --model zoo:resnet20 --weights resnet20.safetensors --data cifar10 -o resnet20.bitdial",
        "bitdial quantize --model my_net.py:Net --weights net.pt --data pictures --resize 224 -o net.bitdial",
        "bitdial quantize --model zoo:digits --weights w.safetensors --data digits --selector greedy -o digits.bitdial",
        "bitdial quantize --model my_net.onnx --data pictures --resize 224 -o net.bitdial",
        "bitdial quantize --model zoo:resnet20 --weights w.safetensors --data cifar10 --target paper -o four-bits.bitdial",
        "bitdial quantize --model zoo:vgg --weights v.safetensors --data cifar10 --target avx2 -o for-avx2.bitdial",
    ),
    finetune.finetune: (
        "bitdial finetune resnet20.bitdial --model zoo:resnet20 --weights resnet20.safetensors --data cifar10 -o tuned.bitdial",
        "bitdial finetune resnet20.bitdial --model zoo:resnet20 --weights resnet20.safetensors --data cifar10 -o tuned.bitdial "
        "--epochs 2 --report tuned.html",
        "bitdial finetune --model my_net.py:Net --weights net.pt --data pictures --resize 224 --device cuda -o tuned.bitdial",
    ),
    compile.compile: (
        "bitdial compile --model zoo:resnet20 --weights resnet20.safetensors --data cifar10 --budget-size 70% -o plan.bitdial",
        "bitdial compile --model zoo:vgg --weights v.safetensors --data cifar10 --metric sqnr --budget-latency 85% -o v.bitdial",
        "bitdial compile --model my_net.py:Net --weights net.pt --data pictures --precisions int8,bfloat16,float32 "
        "--accuracy-floor 91% -o mixed.bitdial",
    ),
    evaluate.evaluate: (
        "bitdial evaluate resnet20.bitdial --data cifar10 --ratios 0,50,100",
        "bitdial evaluate digits.bitdial --data digits --engine cpu --json",
    ),
    inspect.inspect: (
        "bitdial inspect resnet20.bitdial --layers",
        "bitdial inspect resnet20.bitdial --verify --json",
        "bitdial inspect resnet20.bitdial --engine cpu --batch 8",
        "bitdial inspect resnet20.bitdial --engine cpu --isa avx2 --kernels fixed",
        "bitdial inspect resnet20.bitdial --engine npu",
    ),
    compare.compare: (
        "bitdial compare evolutionary.bitdial greedy.bitdial",
        "bitdial compare a.bitdial b.bitdial --data cifar10 --images 2000",
    ),
    report.report: (
        "bitdial report resnet20.bitdial -o resnet20.html",
        "bitdial report resnet20.bitdial -o resnet20.html --data cifar10",
    ),
    benchmark.benchmark: (
        "bitdial benchmark resnet20.bitdial --batch 1,8 --threads 1,2",
        "bitdial benchmark resnet20.bitdial --ratio 0,50,100 --plot latency.svg -o latency.json",
    ),
    latency_table.latency_table: (
        "bitdial latency-table resnet20.bitdial -o zen4.json",
        "bitdial latency-table resnet50.bitdial -o zen4-2t.json --threads 2 --batch 1",
        "bitdial quantize --model zoo:resnet20 --weights w.safetensors --data cifar10 --low-bits auto --latency-table "
        "zen4.json -o wide.bitdial",
    ),
    serve.serve: (
        "bitdial serve resnet20.bitdial --slo-ms 50",
        "bitdial serve small=resnet20.bitdial large=resnet56.bitdial --slo-ms 50 --min-accuracy 88%",
        "bitdial serve --config server.toml --host 0.0.0.0 --api-key-file key.txt --tls-cert cert.pem --tls-key key.pem",
    ),
    loadtest.loadtest: (
        "bitdial loadtest http://127.0.0.1:8000 --poisson 40 --images 16 --slo-ms 50 --html load.html",
        "bitdial loadtest http://127.0.0.1:8000 resnet20 --step 20:10s,80:10s,20:10s -o adaptive.json --png load.png",
        "bitdial loadtest http://127.0.0.1:8000 --trace requests.csv --speed 60 --duration 60s --data test.npz --images 16",
        "bitdial loadtest --compare adaptive.json fixed8.json -o compared.html --png compared.png",
    ),
    deploy.deploy: (
        "bitdial deploy resnet20.bitdial --slo-ms 50 --min-replicas 1 --max-replicas 8 --threads 1",
        "bitdial deploy resnet20.bitdial --address ray://head:10001 --ship --detach",
        "bitdial deploy resnet20.bitdial --max-replicas 8 --dry-run > serve.yaml",
    ),
    simulate.simulate: (
        "bitdial simulate table.json --poisson 60 --images 16 --slo-ms 80 --compare --plot run.png",
        "bitdial simulate table.json --trace requests.csv --speed 60 --rate 2000 --slo-ms 50 --replicas auto --mean-accuracy 87%",
        "bitdial simulate resnet20.bitdial --poisson 200 --slo-ms 50 --overhead-ms 0.5 --shared-core",
        "bitdial simulate --replay decisions.jsonl",
    ),
    export_c.export_c: (
        "bitdial export-c resnet20.bitdial -o resnet20-c",
        "bitdial export-c resnet20.bitdial -o small --ratio 100% --name resnet20_low",
        "bitdial export-c resnet20.bitdial -o fast --ram 250000",
    ),
    export_onnx.export_onnx: (
        "bitdial export-onnx resnet20.bitdial --ratio 50 -o resnet20-half.onnx",
        "bitdial export-onnx resnet20.bitdial --ratio 1 --low int8 --opset 19 -o resnet20-low.onnx",
    ),
    export_npu.export_npu: (
        "bitdial export-npu resnet20.bitdial -o resnet20-npu --pad-groups",
        "bitdial export-npu net.bitdial -o net-npu --rows 16 --columns 16",
    ),
    doctor.doctor: ("bitdial doctor", "bitdial doctor --json"),
}
for _command, _lines in _COMMANDS.items():
    app.command(
        name=_command.__name__.replace("_", "-"),
        cls=LazyCommand,
        epilog="\n\n".join(["Examples:", *(f"  {line}" for line in _lines)]),
    )(lazy(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bitdial {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def entry(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """One quantized model, one dial: quantize a PyTorch network once, and choose at run time what share runs at low
    precision.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done; 2 an error of bitdial's own or in the arguments, told in one line; 130 stopped by Ctrl-C; 1 anything else.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json, debug = "--json" in given, "--debug" in given
    machine.yield_waiting_cores()
    try:
        result = app(args=given, prog_name="bitdial", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BitdialError as error:
        if debug:
            traceback.print_exc()
        return _fail(str(error), type(error).__name__, as_json, EXIT_USER_ERROR)
    except _ParserError as error:
        message = str(error.format_message() if hasattr(error, "format_message") else error)
        hint = "see bitdial --help" if not given or given[0].startswith("-") else f"see bitdial {given[0]} --help"
        return _fail(f"{message.rstrip('.')}; {hint}", "UsageError", as_json, EXIT_USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", "KeyboardInterrupt", as_json, EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:  # a bug of bitdial's or of the user's own model code: show where
        traceback.print_exc()
        return _fail(f"unexpected {type(error).__name__}: {error}", type(error).__name__, as_json, EXIT_ERROR)


def _fail(message: str, kind: str, as_json: bool, code: int) -> int:
    """One line on stderr; with --json also an object on stdout."""
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": line, "type": kind}))
        sys.stdout.flush()
    return code
