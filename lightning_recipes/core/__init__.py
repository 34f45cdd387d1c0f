"""The playbook as plain Python and torch: rules that know no Trainer and run in any loop."""
