// Reads a JSON list of would-be snapshots; prints, for each, why it is none, or null.

import { readFileSync } from "node:fs";
import { problem } from "../../web/js/schema.js";

console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(problem)));
