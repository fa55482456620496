"""``options=`` of ``torch.compile``, checked, as one frozen value."""
