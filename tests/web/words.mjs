// Reads {percent: [numbers]}; prints the page's words for them as JSON.

import { readFileSync } from "node:fs";
import { percent } from "../../web/js/view.js";

const given = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify({ percent: given.percent.map(percent) }));
