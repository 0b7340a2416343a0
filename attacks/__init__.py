"""The attacks: one file each, one row here. Third parties add theirs by the entry point
`fltoolkit.attacks`."""

ATTACKS = {
    "dlfa": "attacks.dlfa:DLFA",
    "dlg": "attacks.dlg:DLG",
    "features": "attacks.features:Features",
    "generative": "attacks.generative:Generative",
    "gradinversion": "attacks.gradinversion:GradInversion",
    "idlg": "attacks.idlg:IDLG",
    "inverting": "attacks.inverting:Inverting",
    "learned": "attacks.learned:Learned",
    "sme": "attacks.sme:SME",
}
