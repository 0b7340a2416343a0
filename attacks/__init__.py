"""The attacks: one file each, one row here. Third parties add theirs by the entry point
`fltoolkit.attacks`."""

ATTACKS = {
    "dlg": "attacks.dlg:DLG",
    "idlg": "attacks.idlg:IDLG",
}
