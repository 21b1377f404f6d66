"""`make audit`: known vulnerabilities of the packages in constraints.txt, by pip-audit.

Exits 0 if all packages were looked up and none is vulnerable, 1 if one is, and 2 if the index did not answer: mirrors without
PyPI's JSON know no vulnerabilities, and pip-audit calls that "none found".
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parents[1] / "constraints.txt"
COMMAND = [
    sys.executable,
    "-m",
    "pip_audit",
    "-r",
    str(PINS),
    "--no-deps",
    "--disable-pip",
    "-f",
    "json",
    "--progress-spinner",
    "off",
]

done = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
try:
    packages = json.loads(done.stdout)["dependencies"]
except (ValueError, KeyError):
    reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    print(f"not audited: the index of vulnerabilities is not reachable ({reason[:200]})", file=sys.stderr)
    sys.exit(2)
skipped = [each for each in packages if "skip_reason" in each]
vulnerable = [each for each in packages if each.get("vulns")]
for each in vulnerable:
    found = ", ".join(
        f"{one['id']} (mended in {', '.join(one['fix_versions']) or 'no version yet'})" for one in each["vulns"]
    )
    print(f"{each['name']} {each['version']}: {found}")
print(f"{len(packages) - len(skipped)} of {len(packages)} packages audited, {len(vulnerable)} vulnerable")
if vulnerable:
    sys.exit(1)
if skipped:
    print(
        f"not audited: the index does not know {len(skipped)} packages, as {skipped[0]['name']}; it may be a mirror",
        file=sys.stderr,
    )
    sys.exit(2)
