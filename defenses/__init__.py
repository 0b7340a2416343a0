"""The defenses: one file each, one row here. Third parties add theirs by the entry point
`fltoolkit.defenses`."""

DEFENSES = {
    "clip": "defenses.clip:Clip",
    "gaussian": "defenses.gaussian:Gaussian",
    "secagg": "defenses.secagg:SecAgg",
}
