"""rankscope inside other tools: `rankscope.integrations.axolotl.RankscopePlugin`."""
