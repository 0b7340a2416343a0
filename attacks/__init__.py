"""The attacks: one file each, one row here. Third parties add theirs by the entry point
`fltoolkit.attacks`."""

ATTACKS = {
    "dlg": "attacks.dlg:DLG",
    "gradinversion": "attacks.gradinversion:GradInversion",
    "idlg": "attacks.idlg:IDLG",
    "inverting": "attacks.inverting:Inverting",
    "learned": "attacks.learned:Learned",
}
