"""The command group `reproduce`: tables and figures of the papers, one module a study."""
