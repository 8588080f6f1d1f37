"""Operations: logs, traces, metrics, API keys, TLS, admission control, ports and the compile cache."""
