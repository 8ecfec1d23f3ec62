"""A check as JUnit XML, which build servers read: one test case for each gate on each variant.

What cannot be told is an ``error`` and a regression a ``failure``, so that both fail a build. The shape is that of
Jenkins' xUnit plugin (``junit-10.xsd``).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from quantkit.gates.results import GateResult
from quantkit.regression.document import Check
from quantkit.regression.pages.words import VERDICTS

_BELOW_SPACE = "\t\n\r"


def render_junit(check: Check) -> str:
    """The check as XML."""
    failures = sum(gate.outcome == "regressed" for gate in check.gates)
    errors = sum(gate.outcome == "unknown" for gate in check.gates)
    broken = [variant for variant in check.variants if variant.status != "ok"]
    root = ET.Element("testsuites")
    suite = ET.SubElement(root, "testsuite", timestamp=check.started[:19])
    for element, name in ((root, "quantkit check"), (suite, check.name)):
        element.set("name", _plain(name))
        element.set("time", f"{check.seconds:.3f}")
        element.set("tests", str(len(check.gates) + len(broken)))
        element.set("failures", str(failures))
        element.set("errors", str(errors + len(broken)))
    for gate in check.gates:
        _add_gate(suite, check, gate)
    for variant in broken:
        case = ET.SubElement(
            suite, "testcase", classname=_plain(f"{check.name}.{variant.name}"), name="made and scored"
        )
        ET.SubElement(case, "error", message=_plain(variant.error or "failed"), type="failed")
    ET.SubElement(suite, "system-out").text = _plain(check.summary)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_gate(suite: ET.Element, check: Check, gate: GateResult) -> None:
    case = ET.SubElement(
        suite, "testcase", classname=_plain(f"{check.name}.{gate.variant}"), name=_plain(gate.gate), time="0"
    )
    if gate.outcome != "passed":
        kind = "failure" if gate.outcome == "regressed" else "error"
        found = ET.SubElement(case, kind, message=_plain(gate.reason), type=VERDICTS[gate.outcome])
        found.text = "\n".join(_plain(each.reason) for each in gate.comparisons if each.reason)


def _plain(text: str) -> str:
    """Text without the characters that XML 1.0 cannot hold."""
    return "".join(each if each >= " " or each in _BELOW_SPACE else "\N{REPLACEMENT CHARACTER}" for each in text)
