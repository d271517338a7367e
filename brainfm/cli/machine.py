"""The machine that brainfm runs on: doctor."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for a program to read.")
def doctor_command(as_json: bool) -> None:
    """Say what of this machine brainfm works with, and what is wrong or missing: send this along with a question.

    Python, torch and its instruction sets, GPUs, packages, caches, the Hub, and the weights that are here, whose
    digests are compared. Exit code 1: something is wrong. What only some need (an extra, a token) is a note.
    """
    from brainfm.doctor import Finding, examine

    marks = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
    findings: list[Finding] = []
    for one in examine():
        findings.append(one)
        if not as_json:
            advice = f"\n{'':27}→ {one.advice}" if one.advice else ""
            click.echo(f"{marks[one.state]} {one.subject:18} {one.said}{advice}")
    if as_json:
        click.echo(json.dumps([asdict(one) for one in findings], indent=1, ensure_ascii=False))
    if any(one.state == "problem" for one in findings):
        sys.exit(1)
