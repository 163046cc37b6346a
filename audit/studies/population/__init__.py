"""The study of many networks: does RV predict robustness? Its plan, its networks, what is measured, and its rows."""
