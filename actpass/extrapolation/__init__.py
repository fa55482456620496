"""Plans of deep models, from five of their layers."""
