"""The attacks: one file each, one row here. Third parties add theirs by the entry point
`fltoolkit.attacks`."""

import fltoolkit  # noqa: F401  (before torch: it sets how threads wait)

ATTACKS = {
    "difference": "attacks.difference:Difference",
    "disaggregation": "attacks.disaggregation:Disaggregation",
    "dlfa": "attacks.dlfa:DLFA",
    "dlg": "attacks.dlg:DLG",
    "features": "attacks.features:Features",
    "generative": "attacks.generative:Generative",
    "gradinversion": "attacks.gradinversion:GradInversion",
    "idlg": "attacks.idlg:IDLG",
    "inconsistency": "attacks.inconsistency:Inconsistency",
    "inverting": "attacks.inverting:Inverting",
    "natural": "attacks.natural:Natural",
    "isolation": "attacks.isolation:Isolation",
    "learned": "attacks.learned:Learned",
    "sme": "attacks.sme:SME",
}
