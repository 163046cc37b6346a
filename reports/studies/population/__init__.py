"""The study of many networks: does RV predict robustness? Its rows analysed, drawn and told."""
