"""Who makes nodes: Kubernetes, EC2 Auto Scaling, a simulator. The contract is `warmpool.provider`."""
