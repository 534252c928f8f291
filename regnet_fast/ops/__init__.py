"""The operations: one file each with the public function, the registered operator, its fake and its autograd."""
