"""The MoEDeployment resource: types, defaults, rules, and the CRD generated from them."""
