"""Whether the text of a licence is one that programs recognise: an SPDX expression.

Owns the grammar and a list of identifiers that data, code and weights are published under; any text
may stand in a manifest. Invariant: what passes here is an SPDX expression; what does not may be one
with an identifier that is not listed.
"""

from __future__ import annotations

import re

# Of the SPDX licence list, those that datasets, programs and models are met under.
LISTED = """
0BSD AFL-3.0 AGPL-3.0-only AGPL-3.0-or-later Apache-2.0 Artistic-2.0 BSD-2-Clause BSD-3-Clause
BSL-1.0 C-UDA-1.0 CC-BY-1.0 CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0 CC-BY-NC-2.0 CC-BY-NC-3.0
CC-BY-NC-4.0 CC-BY-NC-ND-3.0 CC-BY-NC-ND-4.0 CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0 CC-BY-ND-3.0
CC-BY-ND-4.0 CC-BY-SA-2.0 CC-BY-SA-3.0 CC-BY-SA-4.0 CC-PDDC CC0-1.0 CDLA-Permissive-1.0
CDLA-Permissive-2.0 CDLA-Sharing-1.0 ECL-2.0 EPL-2.0 EUPL-1.1 EUPL-1.2 GPL-2.0-only
GPL-2.0-or-later GPL-3.0-only GPL-3.0-or-later ISC LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0-only
LGPL-3.0-or-later MIT MIT-0 MPL-2.0 NCSA O-UDA-1.0 ODC-By-1.0 ODbL-1.0 OGL-UK-3.0 PDDL-1.0
PostgreSQL PSF-2.0 Python-2.0 Unlicense UPL-1.0 W3C WTFPL Zlib AGPL-3.0 GPL-2.0 GPL-3.0 LGPL-2.1
LGPL-3.0
"""
EXCEPTIONS = frozenset({"Classpath-exception-2.0", "GCC-exception-3.1", "LLVM-exception"})

_REFERENCE = re.compile(r"(?:DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+")
_TOKEN = re.compile(r"[()]|[^\s()]+")
_BY_FOLDED = set(LISTED.casefold().split())
_EXCEPTIONS_FOLDED = {name.casefold() for name in EXCEPTIONS}


def is_spdx(text: str) -> bool:
    """Whether a text is an SPDX licence expression of identifiers that are listed here.

    Example:
        >>> is_spdx("CC-BY-4.0"), is_spdx("MIT OR (Apache-2.0 AND LicenseRef-lab)")
        (True, True)
        >>> is_spdx("CC BY 4.0"), is_spdx("MIT AND"), is_spdx("")
        (False, False, False)

    Source: SPDX specification 2.3, annex D.
    """
    depth, before = 0, "("
    for token in _TOKEN.findall(text):
        expects_licence = before in ("(", "AND", "OR")
        if token in ("AND", "OR", "WITH", ")"):
            good = not expects_licence and before != "WITH"
            good = good and (token != "WITH" or _is_licence(before))
        elif before == "WITH":
            good = token.casefold() in _EXCEPTIONS_FOLDED
        else:
            good = expects_licence and (token == "(" or _is_licence(token))
        depth += (token == "(") - (token == ")")
        if not good or depth < 0:
            return False
        before = token
    return depth == 0 and before not in ("(", "AND", "OR", "WITH")


def _is_licence(token: str) -> bool:
    # "+" is "or any later version"; identifiers are matched without regard to case.
    plain = token.removesuffix("+").casefold()
    return plain in _BY_FOLDED or _REFERENCE.fullmatch(token) is not None
